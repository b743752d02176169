"""Keys of the section `data` that have no effect beside the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats import NAMES
from ilrec_dist.data.reading.source import load_format

# What some keys do in a format that does not read them.
INSTEAD = {
    ("recbole", "time_column"): (
        "times are those of timestamp:float, or of the one :float column that looks like a time"
    ),
    ("movielens", "time_column"): "times are those of the archive's ratings file",
    ("amazon", "time_column"): "times are those of the reviews",
}


def ineffective_settings(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, why) for every key that is not its default and has no effect.

    Such as `data.time_column` where the format finds its times itself, or
    `data.split_dates` of a leave-one-out split. `why` names what has an effect instead.
    """
    defaults = DataConfig()
    changed = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    }
    settings = load_format(config.format).settings
    # Keys that only some formats read; all others concern every format that reads files.
    special = frozenset[str]().union(*(load_format(name).settings for name in NAMES)) - {"path"}
    for key in sorted(changed & special - settings):
        formats = ", ".join(name for name in NAMES if key in load_format(name).settings)
        why = INSTEAD.get((config.format, key), f"it is for {formats}")
        yield f"data.{key}", f"has no effect with data.format {config.format}: {why}"
    if config.split == "leave_one_out":
        for key in sorted(changed & {"split_ratio", "split_dates"}):
            yield f"data.{key}", "has no effect without data.split=chronological"
    elif {"split_ratio", "split_dates"} <= changed and config.split_dates is not None:
        yield "data.split_ratio", "has no effect beside data.split_dates; leave one of them out"
    if load_format(config.format).read is None:
        unread = {"path", "max_bad_rows", "min_user_interactions", "min_item_interactions"}
        for key in sorted(changed & unread):
            yield (
                f"data.{key}",
                f"has no effect with data.format {config.format}, which reads no file",
            )
