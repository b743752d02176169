"""The configuration section `data`: what is read, filtered and split."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeAlias

from annotated_types import Ge, Len

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    Float,
    NonNegative,
    OnlyIf,
    Positive,
    PositiveFloat,
    Text,
    section,
)
from ilrec_dist.data.formats import NAMES, load_format

if TYPE_CHECKING:
    FormatName: TypeAlias = str
else:
    FormatName = Literal[NAMES]


@section(affects="prepare")
class SyntheticConfig:
    """The generated catalogue of `data.format: synthetic` (docs/data-formats.md)."""

    users: Positive = 6000
    items: Positive = 1000
    categories: Positive = 20
    # Items per user, at least 5 where this is 5 or more.
    mean_length: Annotated[Float, Ge(3)] = 10.0
    seed: NonNegative = 0


def _is_foreign(config: Any) -> bool:
    return bool(config.data.format != "synthetic")


def _if_format_reads(key: str) -> OnlyIf:
    """A key that only some formats read; each format says so itself."""

    def condition() -> str:
        *others, last = (name for name in NAMES if key in load_format(name).settings)
        return f"data.format {', '.join(others)} or {last}" if others else f"data.format {last}"

    return OnlyIf(condition, lambda config: key in load_format(config.data.format).settings)


def _is_chronological(config: Any) -> bool:
    return bool(config.data.split == "chronological")


def _splits_by_share(config: Any) -> bool:
    return bool(config.data.split == "chronological" and config.data.split_dates is None)


@section(affects="prepare")
class DataConfig:
    """Which data set is read, and how it is filtered and split (docs/data-formats.md)."""

    format: FormatName = "synthetic"
    # The interactions: a file, or the folder that holds them.
    path: Annotated[Optional[str], Affects(), _if_format_reads("path")] = None
    # For csv, parquet and sequences a table with the columns item, title and, if wanted, text;
    # for amazon the metadata.
    items_path: Annotated[
        Optional[str],
        Affects(),
        _if_format_reads("items_path"),
    ] = None
    # The columns of csv and parquet. Without a time column rows are in chronological order.
    user_column: Annotated[str, _if_format_reads("user_column")] = "user"
    item_column: Annotated[str, _if_format_reads("item_column")] = "item"
    time_column: Annotated[Optional[str], _if_format_reads("time_column")] = "timestamp"
    # The k-core, taken to its fixed point. Generated data are not filtered.
    min_user_interactions: Annotated[
        Positive, OnlyIf("a data.format other than synthetic", _is_foreign)
    ] = 5
    min_item_interactions: Annotated[
        Positive, OnlyIf("a data.format other than synthetic", _is_foreign)
    ] = 5
    split: Literal["leave_one_out", "chronological"] = "leave_one_out"
    # For a chronological split the shares of interactions in training, validation and test.
    split_ratio: Annotated[
        list[PositiveFloat],
        Len(3, 3),
        OnlyIf("data.split chronological without data.split_dates", _splits_by_share),
    ] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    # For a chronological split where validation and test begin, instead of split_ratio.
    split_dates: Annotated[
        Optional[Annotated[list[Text], Len(2, 2)]],
        OnlyIf("data.split chronological", _is_chronological),
    ] = None
    # Malformed rows that are tolerated; they are listed in rejects.jsonl.
    max_bad_rows: Annotated[
        NonNegative, OnlyIf("a data.format other than synthetic", _is_foreign)
    ] = 0
    # Training reads every user's training items backwards too.
    both_directions: Annotated[Bool, Affects("cf", "train")] = False
    synthetic: Annotated[SyntheticConfig, _if_format_reads("synthetic")] = field(
        default_factory=SyntheticConfig
    )
