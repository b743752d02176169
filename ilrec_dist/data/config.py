"""The configuration section `data`: what is read, filtered and split."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Literal, Optional, TypeAlias

from annotated_types import Ge, Len

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    Float,
    NonNegative,
    Positive,
    PositiveFloat,
    Text,
    section,
)
from ilrec_dist.data.formats import NAMES

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


@section(affects="prepare")
class DataConfig:
    """Which data set is read, and how it is filtered and split
    (docs/data-formats.md).
    """

    format: FormatName = "synthetic"
    # The interactions: a file, or the folder that holds them.
    path: Annotated[Optional[str], Affects()] = None
    # For csv, parquet and sequences a table with the columns item, title and, if wanted, text;
    # for amazon the metadata.
    items_path: Annotated[Optional[str], Affects()] = None
    # The columns of csv and parquet. Without a time column rows are in chronological order.
    user_column: str = "user"
    item_column: str = "item"
    time_column: Optional[str] = "timestamp"
    # The k-core, taken to its fixed point. Generated data are not filtered.
    min_user_interactions: Positive = 5
    min_item_interactions: Positive = 5
    split: Literal["leave_one_out", "chronological"] = "leave_one_out"
    # For a chronological split the shares of interactions in training, validation and test.
    split_ratio: Annotated[list[PositiveFloat], Len(3, 3)] = field(
        default_factory=lambda: [0.8, 0.1, 0.1]
    )
    # For a chronological split where validation and test begin, instead of split_ratio.
    split_dates: Optional[Annotated[list[Text], Len(2, 2)]] = None
    # Malformed rows that are tolerated; they are listed in rejects.jsonl.
    max_bad_rows: NonNegative = 0
    # Training reads every user's training items backwards too.
    both_directions: Annotated[Bool, Affects("cf", "baseline", "train")] = False
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
