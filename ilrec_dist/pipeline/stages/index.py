"""The index stage: every item gets its code tuple; the catalogue is stored in code order."""

from __future__ import annotations

from ilrec_dist.cf.sasrec.checkpoint import item_vectors
from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.console import console
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.items.build import build_catalogue, input_files
from ilrec_dist.items.index_report import index_summary
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.stage import Stage


def index_stage(config: Config) -> Stage:
    return Stage(
        "index",
        "index",
        # Codes that are built from the CF model's item vectors stand on that model.
        after=("cf",) if config.items.from_cf else ("prepare",),
        settings=stage_settings(config, "index") | {"given": config.items.index is not None},
        inputs=lambda: input_files(config.items),
        output=RunFolders(config.run_dir).items,
        run=lambda: index(config),
    )


def index(config: Config) -> str | None:
    artifacts = RunArtifacts(config)
    vectors = item_vectors(artifacts.folders.cf) if config.items.from_cf else None
    report = build_catalogue(config.items, artifacts.dataset, artifacts.folders.items, vectors)
    if report["warning"]:
        console.print(
            f"index: warning: {report['warning']}", highlight=False, markup=False, soft_wrap=True
        )
    return index_summary(report)
