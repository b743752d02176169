"""What answers requests: one class for each
way to compute the lists, behind one protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.inference.inputs import HistoryRanges
from ilrec_dist.inference.ranker import Ranker


@dataclass(frozen=True)
class ScoredItem:
    """One recommended item; score is Σ log p over the item's tokens, or log p of a
    fusion over its candidates.
    """

    item: str
    title: str | None
    score: float


class Backend(Protocol):
    """Computes lists for histories."""

    def recommend(
        self, histories: Sequence[Sequence[str]], top: int, exclude_seen: bool
    ) -> list[list[ScoredItem]]:
        """At most `top` items for each history of item ids (oldest first), best first.

        Raises UserError that names the history (from
        0) which is empty or has an unknown item.
        """


class LocalBackend:
    """The ranker's model in this process, on its device; one request at a time."""

    def __init__(self, ranker: Ranker, dataset: InteractionDataset) -> None:
        self.ranker, self.dataset = ranker, dataset
        self.item_index = {item: number for number, item in enumerate(dataset.item_ids)}

    def recommend(
        self, histories: Sequence[Sequence[str]], top: int, exclude_seen: bool
    ) -> list[list[ScoredItem]]:
        """As the protocol has it."""
        if not histories:
            return []
        numbers = [self._numbers(row, history) for row, history in enumerate(histories)]
        stop = np.cumsum([len(history) for history in numbers])
        ranges = HistoryRanges(
            np.concatenate(numbers), stop - [len(history) for history in numbers], stop
        )
        answers: list[list[ScoredItem]] = [[] for _ in histories]
        for rows, ranked in self.ranker.rank(ranges, top=top, exclude_seen=exclude_seen):
            for row, items, scores in zip(rows, ranked.items, ranked.scores, strict=True):
                scored = zip(items[:top].tolist(), scores[:top].tolist(), strict=True)
                answers[row] = [self._scored(item, score) for item, score in scored if item >= 0]
        return answers

    def _numbers(self, row: int, history: Sequence[str]) -> np.ndarray:
        """int64 item indices of a history."""
        if not history:
            raise UserError(f"history {row} is empty; expected at least one item id")
        for item in history:
            if item not in self.item_index:
                raise UserError(
                    f"history {row} has the item {item!r}, which is not among the "
                    f"{len(self.item_index):,} items that the model was trained on; leave it out"
                )
        return np.array([self.item_index[item] for item in history], np.int64)

    def _scored(self, item: int, score: float) -> ScoredItem:
        titles = self.dataset.titles
        return ScoredItem(self.dataset.item_ids[item], titles[item] if titles else None, score)
