"""Turns the windows of a step into token tensors, response rows and candidate lists."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.samples.windows import Windows


@dataclass(frozen=True)
class RowGroups:
    """How many of a batch's rows are trained in
    each way (METHOD.md §10), in their order.
    """

    # Item tokens after a history, which have rewards.
    rewarded: int
    # Item tokens of alignment tasks that show no history: they have none.
    unrewarded: int
    # Words: plain cross-entropy over the whole vocabulary.
    text: int
    # Candidates of the rows with rewards.
    num_rewards: int


@dataclass(frozen=True)
class ItemRows:
    """The rows of T items' tokens as far as the
    trie decides them, N' of the T × C grid.
    """

    targets: torch.Tensor  # int64 [N']
    # Trie children of each row's prefix, in CSR form.
    indptr: torch.Tensor  # int64 [N' + 1]
    tokens: torch.Tensor  # int64 [nnz]
    # As in Batch, of all T items.
    reward_mask: np.ndarray | None
    grid_index: torch.Tensor | None
    # int64 [T + 1]: where the children of each item's part of the grid begin.
    item_indptr: np.ndarray

    @staticmethod
    def of(catalogue: Catalogue, trie: Trie, items: np.ndarray) -> ItemRows:
        """Of item indices int [T]."""
        in_target = np.arange(catalogue.depth) < catalogue.item_lengths(items)[:, None]  # [T, C]
        grid_indptr, tokens = trie.target_candidates(items)
        indptr, reward_mask, grid_index = grid_indptr, None, None
        if not in_target.all():
            counts = np.diff(grid_indptr)
            reward_mask = np.repeat(in_target.ravel(), counts)
            grid_index = torch.from_numpy(np.flatnonzero(in_target))
            indptr = np.append(0, np.cumsum(counts[in_target.ravel()]))
            tokens = tokens[reward_mask]
        targets = catalogue.item_tokens(items)[in_target]
        return ItemRows(
            _int64(targets),
            _int64(indptr),
            _int64(tokens),
            reward_mask,
            grid_index,
            grid_indptr[:: catalogue.depth],
        )

    def reward_mask_of(self, count: int) -> np.ndarray | None:
        """The mask of the first `count` items."""
        if self.reward_mask is None:
            return None
        return self.reward_mask[: self.item_indptr[count]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences with T targets, whose tokens are N response rows.

    Rows are target-major, then by position in the item: (t0, p0), (t0,
    p1), …, up to the item's last token. An item has up to C tokens; the
    T × C grid of targets and positions is what rewards are answered for.
    """

    tokens: torch.Tensor  # int64 [B, S], padded on the right
    # int64 [N]: flat positions in B · S whose next token belongs to a target item.
    rows: torch.Tensor
    targets: torch.Tensor  # int64 [N]
    # Trie children of each row's prefix, in CSR form.
    candidate_indptr: torch.Tensor  # int64 [N + 1]
    candidate_tokens: torch.Tensor  # int64 [nnz]
    # Where some targets have fewer than C tokens: which rewards of the grid's rows are those of
    # candidate_tokens (bool), and each row's index in the grid (int64 [N], ascending). None
    # where the rows are the whole grid.
    reward_mask: np.ndarray | None
    grid_index: torch.Tensor | None
    # int64 [T]: each target's user, and its position in the user's sequence.
    users: np.ndarray
    positions: np.ndarray
    # N of the whole optimizer step, over ranks and accumulation steps (METHOD.md §6).
    step_rows: int
    # Input tokens without padding.
    num_tokens: int
    # None where all rows are item tokens with rewards. Candidates are those of item tokens, the
    # mask, users and positions of those with rewards.
    groups: RowGroups | None

    @property
    def num_rewards(self) -> int:
        """The candidates that have a reward: the first ones."""
        return self.candidate_tokens.numel() if self.groups is None else self.groups.num_rewards

    def model_inputs(self, device: torch.device) -> tuple[Any, ...]:
        """What the objective takes: tensors on the
        device, and the groups where there are any.
        """
        inputs = (
            self.tokens,
            self.rows,
            self.targets,
            self.candidate_indptr,
            self.candidate_tokens,
        )
        on_device = tuple(tensor.to(device, non_blocking=True) for tensor in inputs)
        return on_device if self.groups is None else (*on_device, astuple(self.groups))


class BatchMaker:
    """Builds batches from windows. The arrays it reads are shared and never written."""

    def __init__(
        self, dataset: InteractionDataset, catalogue: Catalogue, trie: Trie, windows: Windows
    ):
        self.dataset, self.catalogue, self.trie, self.windows = dataset, catalogue, trie, windows
        self.samples = windows

    def make(self, window_ids: np.ndarray, step_rows: int) -> Batch:
        """The micro-batch of these windows (int64 [B]).

        No windows give one sequence of padding
        without rows: every rank takes part in a step.
        """
        depth = self.catalogue.depth
        slices = self.windows.slices(window_ids)

        # Items of each window, their token counts, and where each item ends in its sequence.
        column = np.arange(int(slices.lengths.max()) if len(slices) else 1)
        inside = column < slices.lengths[:, None]  # [B, items]
        flat = (self.dataset.offsets[slices.user] + slices.start)[:, None] + column
        items = self.dataset.items[np.where(inside, flat, 0)]
        item_lengths = np.where(inside, self.catalogue.item_lengths(items), 0)
        ends = np.cumsum(item_lengths, axis=1)

        # The token grid. A sequence's last token is never an input.
        sequence_lengths = ends[:, -1]
        longest = int(sequence_lengths.max()) if len(slices) else depth
        width = max(longest - 1, 1)
        padding = self.catalogue.vocabulary.padding
        tokens = np.full((max(len(slices), 1), max(longest, 2)), padding, np.int64)
        if len(slices):
            in_sequence = np.arange(tokens.shape[1]) < sequence_lengths[:, None]
            in_item = np.arange(depth) < item_lengths[:, :, None]
            tokens[in_sequence] = self.catalogue.item_tokens(items)[in_item]

        # The rows of each target: the positions before each of its tokens.
        is_target = inside & (column >= (slices.target - slices.start)[:, None])
        sequence, ordinal = np.nonzero(is_target)  # [T]
        target_lengths = item_lengths[sequence, ordinal]
        first_row = sequence * width + ends[sequence, ordinal] - target_lengths - 1
        rows = ItemRows.of(self.catalogue, self.trie, items[sequence, ordinal])
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :width])),
            rows=torch.from_numpy(ragged_ranges(first_row, target_lengths)),
            targets=rows.targets,
            candidate_indptr=rows.indptr,
            candidate_tokens=rows.tokens,
            reward_mask=rows.reward_mask,
            grid_index=rows.grid_index,
            users=slices.user[sequence],
            positions=(slices.start[sequence] + ordinal).astype(np.int64),
            step_rows=step_rows,
            num_tokens=int((sequence_lengths - 1).sum()),
            groups=None,
        )

    @property
    def packs(self) -> bool:
        """Whether its batches may go through the layers without their padding."""
        return True

    def num_tokens(self, window_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the input tokens of each window's sequence."""
        slices = self.windows.slices(window_ids)
        if self.catalogue.pieces is None or len(slices) == 0:
            return slices.lengths * self.catalogue.depth - 1
        begin = self.dataset.offsets[slices.user] + slices.start
        items = self.dataset.items[ragged_ranges(begin, slices.lengths)]
        first = np.cumsum(slices.lengths) - slices.lengths
        tokens = np.add.reduceat(self.catalogue.item_lengths(items), first)
        return np.asarray(tokens - 1, np.int64)

    def num_rows(self, window_ids: np.ndarray) -> int:
        """Response rows of these windows: the tokens of their targets."""
        slices = self.windows.slices(window_ids)
        if self.catalogue.pieces is None:
            return slices.num_targets * self.catalogue.depth
        targets = ragged_ranges(
            self.dataset.offsets[slices.user] + slices.target, slices.stop - slices.target
        )
        return int(self.catalogue.item_lengths(self.dataset.items[targets]).sum())


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.int64))
