"""The report: results.json and report.html of a run whose stages are all done."""

from __future__ import annotations

from pathlib import Path

from ilrec_dist.common.console import console
from ilrec_dist.config.load import dump_config
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.records import verify_output
from ilrec_dist.pipeline.report_material import report_material
from ilrec_dist.pipeline.stages.evaluate import (
    collect_examples,
    collect_figures,
    method_labels,
    paired_intervals,
)
from ilrec_dist.reporting.html.curves import MethodMetrics
from ilrec_dist.reporting.html.report import write_report
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.reporting.results import RESULTS_FILE, print_table, write_results


def report(config: Config, stage_seconds: dict[str, float]) -> None:
    artifacts = RunArtifacts(config)
    verify_output(artifacts.folders, "evaluate")
    figures = collect_figures(config, artifacts)
    rows, intervals = [one.row for one in figures], paired_intervals(config, figures)
    trained = [(method, seed) for method in config.train.methods for seed in config.train.seeds]
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
        metrics=[
            MethodMetrics(method, seed, read_metrics(artifacts.folders.training(method, seed)))
            for method, seed in trained
        ],
        labels=method_labels(),
        examples=collect_examples(config, artifacts),
        config_yaml=dump_config(config),
        **report_material(config, artifacts),
    )
    shares = " · ".join(f"{name} {seconds:.0f} s" for name, seconds in stage_seconds.items())
    console.print(
        f"{shares}\nresults: {config.run_dir / RESULTS_FILE}   report: {path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
