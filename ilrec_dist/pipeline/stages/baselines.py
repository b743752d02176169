"""The stages of the sequence models that
`evaluation.baselines` asks for; without it none.
"""

from __future__ import annotations

from functools import partial

import torch

from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation.baselines.fit import train_baseline
from ilrec_dist.launch.device import resolve_device
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.stage import Stage
from ilrec_dist.reporting.progress import stage_progress


def baseline_stage(name: str) -> str:
    """The name of the stage that trains a sequence model."""
    return f"baseline {name}"


def baseline_stages(config: Config) -> list[Stage]:
    settings = stage_settings(config.cf, "baseline") | stage_settings(config.data, "baseline")
    return [
        Stage(
            baseline_stage(name),
            # It runs with the CF models.
            "cf",
            after=("prepare",),
            settings=settings | {"model": name},
            output=RunFolders(config.run_dir).baseline(name),
            run=partial(train, config, name),
        )
        for name in config.evaluation.baselines
    ]


def train(config: Config, name: str) -> str | None:
    """Train one model in this process; returns what it came to."""
    artifacts = RunArtifacts(config)
    device = resolve_device(config.launch) if torch.cuda.is_available() else "cpu"
    with stage_progress(baseline_stage(name), config.cf.epochs, "epochs") as show:
        report = train_baseline(
            name,
            config.cf,
            artifacts.training,
            artifacts.dataset,
            artifacts.folders.baseline(name),
            lambda epoch, ndcg: show(epoch, f"NDCG@10 {ndcg:.4f}"),
            device,
        )
    return (
        f"validation NDCG@10 {report['validation_ndcg@10']:.4f} after {report['best_epoch']} epochs"
    )
