"""`ilrec run`, the commands of single stages, and `ilrec index build`."""

from __future__ import annotations

import argparse

from ilrec_dist.cli.index_commands import report_index
from ilrec_dist.common.terminal import written_out
from ilrec_dist.config.load import load_config
from ilrec_dist.pipeline.artifacts import with_hub_model
from ilrec_dist.pipeline.execute import execute


def run_stage(arguments: argparse.Namespace) -> None:
    flags = []
    if arguments.max_bad_rows is not None:
        flags.append(f"data.max_bad_rows={arguments.max_bad_rows}")
    config = load_config(arguments.config, arguments.overrides + flags)
    execute(
        # Prepare is the one stage that does not read the model.
        config if arguments.command == "prepare" else with_hub_model(config),
        arguments.command,
        resume=arguments.resume,
        verify=arguments.verify,
    )


def build_index(arguments: argparse.Namespace) -> None:
    config = with_hub_model(load_config(arguments.config, arguments.overrides))
    execute(config, "index")
    print(written_out(report_index(config.run_dir)))
