"""Recommendations for new histories by a ranker: the work of `ilrec recommend`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.inference.ranker import Ranker, RankingProgress
from ilrec_dist.inference.request_files import read_allowed_items, read_histories

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Recommendations:
    """Items for every user of a file of histories, in the file's order."""

    # The columns of SCHEMA, best first within a user; ranks count from 1, a score is the ranker's.
    table: pa.Table
    num_users: int
    # Users with an empty list: every item that may be recommended stands in their history.
    num_users_without_items: int


def recommend_items(
    ranker: Ranker,
    dataset: InteractionDataset,
    *,
    histories: str | Path,
    top: int,
    exclude_seen: bool = False,
    allowed: str | Path | None = None,
    progress: RankingProgress | None = None,
) -> Recommendations:
    """The `top` items after each history.

    `histories` is a Parquet file with the columns user and items (see
    `read_histories`); the items are those of the training data, by their ids. With
    exclude_seen no item of the user's own history is returned; with `allowed`, a text
    file of one item id a line, no other item. A user gets fewer rows where fewer items
    are left. Raises UserError for bad input, and where a score is not finite.
    """
    if top < 1:
        raise UserError(f"--top {top}: expected at least 1")
    item_index = {item: number for number, item in enumerate(dataset.item_ids)}
    users, ranges = read_histories(histories, item_index)
    mask = None if allowed is None else read_allowed_items(allowed, item_index)
    parts = ranker.rank(ranges, top=top, exclude_seen=exclude_seen, allowed=mask, progress=progress)
    items = np.full((len(users), top), -1, np.int64)
    scores = np.full((len(users), top), -np.inf, np.float32)
    for rows, ranked in parts:
        width = min(top, ranked.items.shape[1])
        items[rows, :width] = ranked.items[:, :width]
        scores[rows, :width] = ranked.scores[:, :width]
    table = _table(dataset, users, items, scores)
    return Recommendations(table, len(users), int((items[:, 0] < 0).sum()))


def _table(
    dataset: InteractionDataset, users: list[str], items: np.ndarray, scores: np.ndarray
) -> pa.Table:
    """The table of items int64 [n, top], padded with -1, and their scores."""
    row, column = np.nonzero(items >= 0)
    chosen = items[row, column].tolist()
    titles = dataset.titles
    columns = [
        pa.array([users[number] for number in row], pa.string()),
        pa.array(column + 1, pa.int32()),
        pa.array([dataset.item_ids[item] for item in chosen], pa.string()),
        pa.array([None if titles is None else titles[item] for item in chosen], pa.string()),
        pa.array(scores[row, column], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)
