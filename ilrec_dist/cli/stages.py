"""`ilrec run` and the commands of single stages, `ilrec index build`,
`ilrec config`.
"""

from __future__ import annotations

import argparse
import sys

from ilrec_dist.cli.index_commands import report_index
from ilrec_dist.config.load import dump_config, load_config
from ilrec_dist.pipeline.execute import execute


def run_stage(arguments: argparse.Namespace) -> None:
    flags = []
    if arguments.max_bad_rows is not None:
        flags.append(f"data.max_bad_rows={arguments.max_bad_rows}")
    execute(
        load_config(arguments.config, arguments.overrides + flags),
        arguments.command,
        resume=arguments.resume,
        verify=arguments.verify,
    )


def build_index(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    execute(config, "index")
    print(report_index(config.run_dir))


def print_config(arguments: argparse.Namespace) -> None:
    sys.stdout.write(dump_config(load_config(arguments.config, arguments.overrides)))
