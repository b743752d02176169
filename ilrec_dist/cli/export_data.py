"""`ilrec export-data`: a run's interactions and items in the files of other systems."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.export.interactions import export_run
from ilrec_dist.pipeline.records import check_stands_on, verify_descriptions


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.run)
    verify_descriptions(RunFolders(folder), "prepare")
    check_stands_on(RunFolders(folder), "index", ("prepare",))
    export_run(folder, arguments.format, Path(arguments.out))
