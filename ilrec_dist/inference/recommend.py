"""Recommendations for new histories by a ranker: the work of `ilrec recommend`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.inference.ranker import Ranker, RankingProgress
from ilrec_dist.inference.request_files import Histories, HistoriesFile, read_allowed_items

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
class Request:
    """What is asked of a ranker; JSON values, so that workers can be handed it.

    Raises UserError for a `top` below 1.
    """

    # A Parquet file of histories (see `HistoriesFile`), whose items are those of the training
    # data, by their ids.
    histories: str
    # Items of a list; it is shorter where fewer are left.
    top: int = 10
    # Whether the items of a user's own history are left out.
    exclude_seen: bool = False
    # A text file of the items that may be recommended, one id a line; None: all may.
    allowed: str | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top {self.top}: expected at least 1")

    def with_absolute_paths(self) -> Request:
        """The same for processes with another working directory."""
        allowed = None if self.allowed is None else str(Path(self.allowed).absolute())
        histories = str(Path(self.histories).absolute())
        return dataclasses.replace(self, histories=histories, allowed=allowed)

    def check_files(self, dataset: InteractionDataset) -> int:
        """The number of histories. Raises UserError for anything wrong in the files."""
        index = _item_index(dataset)
        if self.allowed is not None:
            read_allowed_items(self.allowed, index)
        file = HistoriesFile(self.histories, index)
        file.check()
        return file.num_rows


class Recommender:
    """Answers a request, some histories at a time."""

    def __init__(self, ranker: Ranker, dataset: InteractionDataset, request: Request) -> None:
        """Raises UserError for unreadable files, and an unknown allowed item."""
        self.ranker, self.request = ranker, request
        index = _item_index(dataset)
        self.histories = HistoriesFile(request.histories, index)
        self._allowed = (
            None if request.allowed is None else read_allowed_items(request.allowed, index)
        )
        self._ids = _strings(dataset.item_ids)
        self._titles = None if dataset.titles is None else _strings(dataset.titles)

    def table(self, histories: Histories, progress: RankingProgress | None = None) -> pa.Table:
        """The items for each history, in the order of the histories.

        The columns are those of SCHEMA, best first within a user; ranks count from 1, a
        score is the ranker's. Raises UserError where a score is not finite.
        """
        top, count = self.request.top, len(histories.users)
        items = np.full((count, top), -1, np.int64)
        scores = np.full((count, top), -np.inf, np.float32)
        for rows, ranked in self.ranker.rank(
            histories.ranges,
            top=top,
            exclude_seen=self.request.exclude_seen,
            allowed=self._allowed,
            progress=progress,
        ):
            width = min(top, ranked.items.shape[1])
            items[rows, :width] = ranked.items[:, :width]
            scores[rows, :width] = ranked.scores[:, :width]
        row, column = np.nonzero(items >= 0)
        chosen = pa.array(items[row, column])
        titles = self._titles
        columns = [
            pa.array(histories.users, pa.string()).take(pa.array(row)),
            pa.array(column + 1, pa.int32()),
            self._ids.take(chosen).cast(pa.string()),
            pa.nulls(len(row), pa.string())
            if titles is None
            else titles.take(chosen).cast(pa.string()),
            pa.array(scores[row, column], pa.float32()),
        ]
        return pa.Table.from_arrays(columns, schema=SCHEMA)


def _item_index(dataset: InteractionDataset) -> dict[str, int]:
    return {item: number for number, item in enumerate(dataset.item_ids)}


def _strings(values: Iterable[str]) -> pa.Array:
    return pa.array(iter(values), pa.large_string())
