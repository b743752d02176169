"""`ilrec study`: a grid of runs and their one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilrec_dist.study.run import run_study


def run(arguments: argparse.Namespace) -> None:
    run_study(
        Path(arguments.study),
        arguments.overrides,
        jobs=arguments.jobs,
        low_priority=arguments.low_priority,
        retry=arguments.retry,
        estimate_only=arguments.estimate,
        time_steps=not arguments.no_timing,
        into=Path(arguments.into) if arguments.into else None,
    )
