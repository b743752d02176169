"""`ilrec analyze`: why a method gains or not,
as tables, analysis.json and in the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.run_layout import ANALYSIS
from ilrec_dist.pipeline.analyze import analyze
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.pipeline.stages.report import report
from ilrec_dist.reporting.analysis import print_analysis


def run(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.run)
    analysis = analyze(folder, arguments.method, arguments.seed, arguments.users)
    config = run_config(folder)
    report(config, open_run(config).stage_seconds())
    print_analysis(analysis)
    print_plain(f"analysis: {folder / ANALYSIS}")
