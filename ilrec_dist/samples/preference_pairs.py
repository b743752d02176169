"""Batches of targets and the items that they
are preferred to, scored in one forward pass.

The history's tokens stand once. The target's own tokens follow them as in any batch,
and each negative is a branch behind the history (model/branches.py): with `targets:
all` and n negatives of C tokens, a sequence of L items takes L · C + (L − 1) · n · (C −
1) tokens instead of the (1 + n) sequences for each of its L − 1 targets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.branches import BranchedSequences
from ilrec_dist.samples.collate import Batch, BatchMaker
from ilrec_dist.samples.negatives import Negatives
from ilrec_dist.samples.windows import Windows


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """A micro-batch of T targets with n negatives each, M = T · (1 + n) continuations.

    Continuations are the T targets, then the negatives, those of a target side by
    side. The rows, their targets and candidates are those of the continuations in
    this order, and `step_rows` counts the targets of the optimizer step.
    """

    # int64 [N]: each row's continuation · C + position in the item.
    cell: torch.Tensor
    # The items of the targets, int64 [T], and of their negatives, int64 [T, n].
    items: np.ndarray
    negatives: np.ndarray
    # None where no continuation has a token of its own besides those of the trunk.
    branches: BranchedSequences | None
    # What is known of each target: float32 [T, 1 + n] log π_ref of target and negatives, and
    # further columns; None where nothing was computed.
    known: torch.Tensor | None

    def model_inputs(self, device: torch.device) -> tuple[Any, ...]:
        """Those of the rows, then cell, T, n, branches and known."""
        return (
            *super().model_inputs(device),
            self.cell.to(device, non_blocking=True),
            len(self.users),
            self.negatives.shape[1],
            None if self.branches is None else self.branches.to(device),
            None if self.known is None else self.known.to(device, non_blocking=True),
        )


class PreferenceBatchMaker(BatchMaker):
    """Builds batches of targets and negatives from windows.

    known: float32 [all targets, columns] in the order of `target_index`, or None.
    """

    def __init__(
        self,
        dataset: InteractionDataset,
        catalogue: Catalogue,
        trie: Trie,
        windows: Windows,
        negatives: Negatives,
        known: np.ndarray | None = None,
    ) -> None:
        super().__init__(dataset, catalogue, trie, windows)
        self.negatives, self.known = negatives, known
        counts = np.maximum(dataset.train_lengths() - 1, 0)
        self._first_target = np.concatenate([[0], np.cumsum(counts)])

    @property
    def num_targets(self) -> int:
        """All targets of the training."""
        return int(self._first_target[-1])

    def target_index(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64: the number of each target among all, by user, then by position."""
        index: np.ndarray = self._first_target[users] + positions - 1
        return index

    @property
    def packs(self) -> bool:
        """Branches are not packed."""
        return self.negatives.count == 0

    def num_tokens(self, window_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: with the branches of as many targets as
        a window of this length may have.
        """
        alone = self.windows.targets == "last"
        targets = 1 if alone else self.windows.sizes(window_ids) - 1
        branches = targets * self.negatives.count * (self.catalogue.depth - 1)
        return super().num_tokens(window_ids) + branches

    def num_rows(self, window_ids: np.ndarray) -> int:
        """The targets of these windows: the loss is a mean over them.

        Without negatives it is the mean over the targets' tokens.
        """
        if self.negatives.count == 0:
            return super().num_rows(window_ids)
        return self.windows.slices(window_ids).num_targets

    def make(self, window_ids: np.ndarray, step_rows: int) -> PreferenceBatch:
        base = super().make(window_ids, step_rows)
        offsets = self.dataset.offsets[base.users]
        items = np.asarray(self.dataset.items[offsets + base.positions], np.int64)
        negatives = self.negatives.draw(base.users, base.positions, items)
        return self._with_branches(base, items, negatives)

    def _with_branches(
        self, base: Batch, items: np.ndarray, negatives: np.ndarray
    ) -> PreferenceBatch:
        """The batch of targets `items` [T] with the negatives [T, n] as branches."""
        (sequences, trunk), (targets, count) = base.tokens.shape, negatives.shape
        item_lengths = self.catalogue.item_lengths(items)
        lengths = self.catalogue.item_lengths(negatives)  # [T, n]
        tokens = self.catalogue.item_tokens(negatives)  # [T, n, C]
        depth = int(lengths.max(initial=1)) - 1

        # Where each target's history ends, and which branches of its sequence are its negatives.
        rows = base.rows.numpy()
        sequence, anchor = np.divmod(rows[np.cumsum(item_lengths) - item_lengths], trunk)
        ordinal = np.arange(targets) - np.searchsorted(sequence, sequence)
        branch = ordinal[:, None] * count + np.arange(count)  # [T, n]
        branches = int(branch.max(initial=-1)) + 1
        width = trunk + branches * depth
        start = sequence[:, None] * width + trunk + branch * depth  # [T, n]

        grid = np.full((sequences, width), self.catalogue.vocabulary.padding, np.int64)
        grid[:, :trunk] = base.tokens.numpy()
        inner = np.arange(depth) < lengths[..., None] - 1  # [T, n, D]
        places = start[..., None] + np.arange(depth)
        grid.reshape(-1)[places[inner]] = tokens[..., :depth][inner]

        # A negative's first token is predicted by the end of the history, like the target's.
        first = np.broadcast_to((sequence * width + anchor)[:, None, None], (targets, count, 1))
        inside = np.arange(depth + 1) < lengths[..., None]  # [T, n, D + 1]
        negative_rows = np.concatenate([first, places], axis=2)[inside]
        indptr, candidates = self._candidates(negatives.reshape(-1))
        anchors = np.zeros((sequences, branches), np.int64)
        anchors[sequence[:, None], branch] = anchor[:, None]
        of_continuation = np.concatenate([item_lengths, lengths.reshape(-1)])
        cells = np.arange(len(of_continuation)) * self.catalogue.depth
        shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(Batch)}
        return PreferenceBatch(
            **shared
            | {
                "tokens": torch.from_numpy(grid),
                "rows": _joined(rows + rows // trunk * (width - trunk), negative_rows),
                "targets": _joined(base.targets.numpy(), tokens[..., : depth + 1][inside]),
                "candidate_indptr": _joined(
                    base.candidate_indptr.numpy(), base.candidate_indptr.numpy()[-1] + indptr[1:]
                ),
                "candidate_tokens": _joined(base.candidate_tokens.numpy(), candidates),
                "num_tokens": base.num_tokens + int((lengths - 1).sum()),
            },
            cell=torch.from_numpy(ragged_ranges(cells, of_continuation)),
            items=items,
            negatives=negatives,
            branches=None
            if branches * depth == 0
            else BranchedSequences(
                trunk, torch.from_numpy(anchors), depth, int(anchors.max()) + depth
            ),
            known=None
            if self.known is None
            else torch.from_numpy(self.known[self.target_index(base.users, base.positions)]),
        )

    def _candidates(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR of the trie children of the prefixes of the items' real tokens."""
        indptr, candidates = self.trie.target_candidates(items)
        real = (
            np.arange(self.catalogue.depth) < self.catalogue.item_lengths(items)[:, None]
        ).reshape(-1)
        counts = np.diff(indptr)
        return np.append(0, np.cumsum(counts[real])), candidates[np.repeat(real, counts)]


def _joined(first: np.ndarray, second: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([first, second]).astype(np.int64))
