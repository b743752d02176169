"""How histories become what the model reads: a
plain sequence of items, or a prompt in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import ItemArray
from ilrec_dist.inference.trie_constraint import ItemSets
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.prompts.template import Template
from ilrec_dist.prompts.writer import PromptRequest, PromptWriter

# Histories whose tokens are counted at once, so that no array of all interactions is made.
CHUNK_HISTORIES = 100_000


@dataclass(frozen=True)
class HistoryRanges:
    """n histories as ranges of one array of item indices, oldest first.

    History r is items[start[r] : stop[r]] and never empty.
    """

    items: ItemArray  # int [T]
    start: np.ndarray  # int64 [n]
    stop: np.ndarray  # int64 [n]

    def seen(self, rows: np.ndarray) -> ItemSets:
        """The items of each row's whole history."""
        return ItemSets.of([self.items[self.start[row] : self.stop[row]] for row in rows])

    def counts(self, max_history: int) -> np.ndarray:
        """int64 [n]: items of each history, at most max_history.

        Raises ValueError for an empty history or none at all.
        """
        counts: np.ndarray = np.minimum(self.stop - self.start, max_history)
        if len(counts) == 0 or counts.min() < 1:
            raise ValueError("expected histories of at least one item each")
        return counts

    def sums(
        self, max_history: int, of_items: np.ndarray | None, catalogue: Catalogue
    ) -> np.ndarray:
        """int64 [n]: a number of each item, summed
        over the last max_history items of each row.

        of_items int [num_items]; None takes the items' numbers of tokens.
        """
        counts = self.counts(max_history)
        sums = np.empty(len(counts), np.int64)
        for low in range(0, len(counts), CHUNK_HISTORIES):
            part = slice(low, low + CHUNK_HISTORIES)
            items = self.items[ragged_ranges(self.stop[part] - counts[part], counts[part])]
            values = catalogue.item_lengths(items) if of_items is None else of_items[items]
            sums[part] = np.add.reduceat(values, np.cumsum(counts[part]) - counts[part])
        return sums


@dataclass(frozen=True)
class Prefixes:
    """What the model reads before it generates, one row a history."""

    tokens: torch.Tensor  # int64 [n, S], padded on the right
    # int64 [n]: the tokens of each row; None where all have S.
    lengths: torch.Tensor | None = None

    def to(self, device: torch.device) -> Prefixes:
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Prefixes(self.tokens.to(device), lengths)


class InputForm(Protocol):
    """Makes a trained model's input of histories,
    in the form that it was trained with.
    """

    def batches(self, histories: HistoryRanges, size: int) -> list[np.ndarray]:
        """All rows (int64), at most `size` a batch, those of similar lengths together.

        Long ones come first, so that the largest batch is met at once and a short
        one ends the work. Raises ValueError for an empty history or none at all.
        """
        ...

    def prefixes(self, histories: HistoryRanges, rows: np.ndarray) -> Prefixes:
        """The input of the rows of one batch."""
        ...


@dataclass(frozen=True)
class PlainSequences:
    """The token sequences of the last max_history items, one after the other.

    The rows of a batch have equally many tokens.
    """

    catalogue: Catalogue
    max_history: int

    def batches(self, histories: HistoryRanges, size: int) -> list[np.ndarray]:
        """As the protocol has it."""
        if self.catalogue.pieces is None:
            lengths = histories.counts(self.max_history) * self.catalogue.depth
        else:
            lengths = histories.sums(self.max_history, None, self.catalogue)
        batches = []
        for length in np.unique(lengths)[::-1]:
            rows = np.flatnonzero(lengths == length)
            batches += [rows[first : first + size] for first in range(0, len(rows), size)]
        return batches

    def prefixes(self, histories: HistoryRanges, rows: np.ndarray) -> Prefixes:
        """As the protocol has it."""
        start, stop = histories.start[rows], histories.stop[rows]
        count = np.minimum(stop - start, self.max_history)
        items = histories.items[ragged_ranges(stop - count, count)]
        real = np.arange(self.catalogue.depth) < self.catalogue.item_lengths(items)[:, None]
        tokens = self.catalogue.item_tokens(items)[real].reshape(len(rows), -1)
        return Prefixes(torch.from_numpy(tokens.astype(np.int64)))


@dataclass(frozen=True)
class Prompts:
    """The last max_history items in a template's words.

    A prompt that leaves no room for the longest item loses its oldest items.
    """

    catalogue: Catalogue
    max_history: int
    writer: PromptWriter
    template: Template

    def batches(self, histories: HistoryRanges, size: int) -> list[np.ndarray]:
        """As the protocol has it. Lengths are
        estimated, and tokenized when a batch is made.
        """
        sizes = self.writer.item_sizes(self.template.history)
        lengths = histories.sums(self.max_history, sizes, self.catalogue)
        order = np.argsort(-lengths, kind="stable")
        return [order[first : first + size] for first in range(0, len(order), size)]

    def prefixes(self, histories: HistoryRanges, rows: np.ndarray) -> Prefixes:
        """As the protocol has it."""
        requests = []
        for row in rows.tolist():
            start, stop = int(histories.start[row]), int(histories.stop[row])
            items = histories.items[max(start, stop - self.max_history) : stop]
            requests.append(PromptRequest(self.template, items, self.catalogue.depth))
        prompts = self.writer.write(requests)
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        tokens = np.full((len(rows), lengths.max()), self.catalogue.vocabulary.padding, np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt.tokens)] = prompt.tokens
        same = (lengths == lengths[0]).all()
        return Prefixes(torch.from_numpy(tokens), None if same else torch.from_numpy(lengths))
