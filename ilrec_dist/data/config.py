"""The configuration section `data`: what is read, filtered and split."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, Optional

from annotated_types import Ge, Len

from ilrec_dist.common.config_fields import (
    Bool,
    Float,
    NonNegative,
    Positive,
    PositiveFloat,
    Text,
    section,
)


@section
class SyntheticConfig:
    """The generated catalogue of `data.format: synthetic` (docs/data-formats.md says how it is drawn)."""

    users: Positive = 6000
    items: Positive = 1000
    categories: Positive = 20
    mean_length: Annotated[Float, Ge(3)] = 10.0  # items per user, at least 5
    seed: NonNegative = 0


@section
class DataConfig:
    format: Literal[
        "synthetic",
        "lcrec",
        "csv",
        "parquet",
        "recbole",
        "amazon",
        "movielens",
        "sequences",
        "minionerec",
    ] = "synthetic"
    path: Optional[str] = (
        None  # the interactions: a file, or the folder that holds them (docs/data-formats.md)
    )
    items_path: Optional[str] = (
        None  # csv, parquet, sequences: a table with the columns item, title and, if wanted, text; amazon: the metadata
    )
    user_column: str = "user"
    item_column: str = "item"
    time_column: Optional[str] = (
        "timestamp"  # csv, parquet; null: the rows are in chronological order
    )
    min_user_interactions: Positive = (
        5  # k-core: to the fixed point (generated data are not filtered)
    )
    min_item_interactions: Positive = 5
    split: Literal["leave_one_out", "chronological"] = "leave_one_out"
    split_ratio: Annotated[list[PositiveFloat], Len(3, 3)] = field(
        default_factory=lambda: [0.8, 0.1, 0.1]
    )  # chronological: shares of interactions
    split_dates: Optional[Annotated[list[Text], Len(2, 2)]] = (
        None  # chronological: where validation and test begin, instead of split_ratio
    )
    max_bad_rows: NonNegative = 0  # malformed rows tolerated; they are listed in rejects.jsonl
    both_directions: Bool = False  # training reads every user's training items backwards too
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
