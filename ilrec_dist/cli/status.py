"""`ilrec status`: how far a run is, from its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilrec_dist.common.terminal import one_line
from ilrec_dist.pipeline.status import status_lines


def run(arguments: argparse.Namespace) -> None:
    for line in status_lines(Path(arguments.run)):
        print(one_line(line))
