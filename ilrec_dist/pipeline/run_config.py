"""The configuration that a run's folder holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import CONFIG
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.run import config_problem


def run_config(run: Path) -> Config:
    """The configuration in a run's folder, pointed at where the folder is now.

    Raises UserError for a folder that is no run's,
    and for a file that is not as it was written.
    """
    if not (run / CONFIG).exists():
        raise UserError(
            f"{run}: not a run folder (no {CONFIG}); name the folder of a finished `ilrec run`, "
            "such as runs/quickstart"
        )
    problem = config_problem(run)
    if problem is not None:
        raise UserError(
            f"{problem}; `ilrec run CONFIG` writes it again, from this file itself where its "
            "settings are meant"
        )
    folder = run.resolve()
    return dataclasses.replace(
        load_config(run / CONFIG), runs_dir=str(folder.parent), name=folder.name
    )
