"""The prepare stage: a foreign data set becomes the run's canonical Parquet files."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.data.prepare import input_files
from ilrec_dist.data.prepare import prepare as prepare_data
from ilrec_dist.launch.cluster import is_on_named_cluster, ray_session
from ilrec_dist.launch.cluster_check import check_nodes
from ilrec_dist.launch.task_places import task_places
from ilrec_dist.pipeline.stage import Stage


def prepare_stage(config: Config) -> Stage:
    return Stage(
        "prepare",
        "prepare",
        after=(),
        settings=stage_settings(config, "prepare"),
        inputs=lambda: input_files(config.data),
        output=RunFolders(config.run_dir).data,
        run=lambda: prepare(config),
    )


def prepare(config: Config) -> str | None:
    """Read, filter and split; the nodes of a named Ray cluster read a folder's files
    together.
    """
    files, folders = spread_files(config), RunFolders(config.run_dir)
    with ray_session(config.launch) if files else nullcontext():
        if files:
            check_nodes(folders.root, [str(path.resolve()) for path in files])
        take = partial(task_places, stage="prepare", seconds=config.launch.timeout_seconds)
        prepare_data(config.data, folders.data, take if files else None)
    return None


def spread_files(config: Config) -> list[Path]:
    """The files that nodes of a named cluster read; none where this process does."""
    if not is_on_named_cluster(config.launch):
        return []
    files = input_files(config.data)
    return files if len(files) > 1 else []
