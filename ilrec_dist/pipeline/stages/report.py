"""The report: results.json and report.html of a run whose stages are all done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.manifest import check_hashes
from ilrec_dist.common.run_layout import RESULT, RunFolders
from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.records import verify_descriptions, verify_output
from ilrec_dist.pipeline.report_material import report_material
from ilrec_dist.pipeline.stage import training_name
from ilrec_dist.pipeline.stages.evaluate import (
    collect_examples,
    collect_figures,
    method_labels,
    paired_intervals,
)
from ilrec_dist.reporting.html.curves import MethodMetrics
from ilrec_dist.reporting.html.report import write_report
from ilrec_dist.reporting.metrics_log import METRICS_FILE, METRICS_SHA256, read_metrics
from ilrec_dist.reporting.results import RESULTS_FILE, print_table, write_results


def training_metrics(folders: RunFolders, method: str, seed: int) -> list[dict[str, Any]]:
    """The log of a finished training; empty where its file is gone.

    Raises UserError that names the file where it is damaged.
    """
    folder = folders.training(method, seed)
    verify_descriptions(folders, training_name(method, seed))
    if (folder / METRICS_FILE).exists():
        digest = read_json_object(folder / RESULT)[METRICS_SHA256]
        repair = "restore it, or delete it for a report without this training's curves"
        check_hashes(folder, {METRICS_FILE: digest}, RESULT, repair)
    return read_metrics(folder)


def report(config: Config, stage_seconds: dict[str, float]) -> None:
    artifacts = RunArtifacts(config)
    # All that is read is checked before anything is written.
    verify_output(artifacts.folders, "evaluate")
    material = report_material(config, artifacts)
    trained = [(method, seed) for method in config.train.methods for seed in config.train.seeds]
    metrics = [
        MethodMetrics(method, seed, training_metrics(artifacts.folders, method, seed))
        for method, seed in trained
    ]
    shown = collect_examples(config, artifacts)
    figures = collect_figures(config, artifacts)
    rows, intervals = [entry.row for entry in figures], paired_intervals(config, figures)
    results = write_results(
        config.run_dir / RESULTS_FILE,
        Path(config.data.path).name if config.data.path else "synthetic",
        rows,
        sum(stage_seconds.values()),
        stage_seconds,
        intervals=intervals,
    )
    print_table(rows, intervals, method_labels())
    path = write_report(
        config.run_dir,
        name=config.name,
        results=results,
        metrics=metrics,
        labels=method_labels(),
        examples=shown,
        config_yaml=dump_config(config),
        **material,
    )
    shares = " · ".join(f"{name} {seconds:.0f} s" for name, seconds in stage_seconds.items())
    print_plain(f"{shares}\nresults: {config.run_dir / RESULTS_FILE}   report: {path}")
