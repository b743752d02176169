"""`ilrec config`: loads the configuration and nothing else."""

from __future__ import annotations

import argparse
import sys

from ilrec_dist.config.load import dump_config, load_config


def print_config(arguments: argparse.Namespace) -> None:
    sys.stdout.write(dump_config(load_config(arguments.config, arguments.overrides)))
