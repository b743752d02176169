"""The configuration that a run's folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import CONFIG
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.run import config_problem


def run_config(run: Path, launch_settings: Sequence[str] = ()) -> Config:
    """The configuration in a run's folder, pointed at where the folder is now.

    launch_settings: `launch.key=value` in the place of the run's own. Raises
    UserError for a folder that is no run's, for a file that is not as it
    was written, and for a setting of another section or of no effect.
    """
    for setting in launch_settings:
        if not setting.startswith("launch."):
            raise UserError(
                f"{setting}: expected launch.key=value; other settings are those of the run"
            )
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
        load_config(run / CONFIG, launch_settings), runs_dir=str(folder.parent), name=folder.name
    )
