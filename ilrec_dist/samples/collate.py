"""Turns the windows of a step into token tensors, response rows, candidate lists and rewards, ahead of the step that uses them."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ilrec_dist.cf.rewards.futures import RewardFuture, RewardSource
from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.samples.windows import Windows

SWITCH_SECONDS = 2e-4  # how long the thread that makes batches may keep the interpreter from the training thread; Python's default is 5 ms


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Rows are target-major, then by position in the item: (t0, p0), (t0, p1), …, up to the item's last token."""

    tokens: torch.Tensor  # int64 [B, S], right-padded with the vocabulary's padding
    rows: torch.Tensor  # int64 [N] flat positions in B·S whose next token belongs to a target item
    targets: torch.Tensor  # int64 [N]
    candidate_indptr: torch.Tensor  # int64 [N + 1]
    candidate_tokens: torch.Tensor  # int64 [nnz], trie children of each row's prefix
    scored: (
        np.ndarray | None
    )  # bool [rewards of the T targets]: those of candidate_tokens; None: all. What stands behind a title's end is none of them
    slots: torch.Tensor | None  # int64 [N]: target · C + position in the item; None: 0 … N − 1
    users: np.ndarray  # int64 [T] user of each target
    positions: np.ndarray  # int64 [T] its place in the user's sequence
    step_rows: (
        int  # N of the whole optimizer step, over ranks and accumulation steps (METHOD.md §6)
    )
    real_tokens: int  # tokens that are not padding


class BatchMaker:
    """Builds batches from windows; all arrays it reads are shared and never written."""

    def __init__(
        self, dataset: InteractionDataset, catalogue: Catalogue, trie: Trie, windows: Windows
    ):
        self.dataset, self.catalogue, self.trie, self.windows = dataset, catalogue, trie, windows

    def make(self, numbers: np.ndarray, step_rows: int) -> Batch:
        """The micro-batch of the given window numbers. An empty selection gives one padded sequence without rows."""
        depth, padding = self.catalogue.depth, self.catalogue.vocabulary.padding
        part = self.windows.take(numbers)
        lengths = part.stop - part.start
        size = int(lengths.max()) if len(part) else 1
        column = np.arange(size)
        inside = column < lengths[:, None]
        flat = (self.dataset.offsets[part.user] + part.start)[:, None] + column
        items = self.dataset.items[np.where(inside, flat, 0)]
        sizes = np.where(inside, self.catalogue.item_lengths(items), 0)  # tokens of each item
        ends = np.cumsum(sizes, axis=1)  # in its sequence
        length = ends[:, -1]
        longest = int(length.max()) if len(part) else depth
        grid = np.full((len(part), longest), padding, np.int64)
        grid[np.arange(longest) < length[:, None]] = self.catalogue.item_tokens(items)[
            np.arange(depth) < sizes[:, :, None]
        ]
        is_target = inside & (column >= (part.target - part.start)[:, None])
        sequence, place = np.nonzero(is_target)
        width = max(
            longest - 1, 1
        )  # the last token is never an input; an empty batch still has one column
        each = sizes[sequence, place]
        target_items = items[sequence, place]
        real = np.arange(depth) < each[:, None]  # [T, C]
        indptr, candidates = self.trie.target_candidates(target_items)
        scored = slots = None
        if not real.all():
            counts = np.diff(indptr)
            scored, slots = np.repeat(real.ravel(), counts), torch.from_numpy(np.flatnonzero(real))
            indptr, candidates = np.append(0, np.cumsum(counts[real.ravel()])), candidates[scored]
        tokens = grid[:, :-1] if len(part) else np.full((1, width), padding, dtype=np.int64)
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
            rows=torch.from_numpy(
                ragged_ranges(sequence * width + ends[sequence, place] - each - 1, each)
            ),
            targets=torch.from_numpy(
                self.catalogue.item_tokens(target_items)[real].astype(np.int64)
            ),
            candidate_indptr=torch.from_numpy(np.asarray(indptr, dtype=np.int64)),
            candidate_tokens=torch.from_numpy(np.asarray(candidates, dtype=np.int64)),
            scored=scored,
            slots=slots,
            users=part.user[sequence],
            positions=(part.start[sequence] + place).astype(np.int64),
            step_rows=step_rows,
            real_tokens=int((length - 1).sum()),
        )

    def num_rows(self, numbers: np.ndarray) -> int:
        """Response rows of the given window numbers: the tokens of their targets."""
        part = self.windows.take(numbers)
        if self.catalogue.pieces is None:
            return part.num_targets * self.catalogue.depth
        targets = ragged_ranges(
            self.dataset.offsets[part.user] + part.target, part.stop - part.target
        )
        return int(self.catalogue.item_lengths(self.dataset.items[targets]).sum())


def micro_batches(step: np.ndarray, dp_rank: int, dp: int, accumulation: int) -> list[np.ndarray]:
    """Window numbers of each of this rank's micro-batches of a step. Dealt in turn, so that lengths are even over ranks."""
    return [step[(dp_rank * accumulation + a) :: dp * accumulation] for a in range(accumulation)]


@dataclass(frozen=True)
class Ready:
    """A batch with its rewards under way."""

    batch: Batch
    rewards: RewardFuture | None


def prefetched(
    plan: Iterator[tuple[np.ndarray, int]],
    make: Callable[[np.ndarray, int], Batch],
    rewards: RewardSource | None,
    ahead: int = 4,
) -> Generator[Ready, None, None]:
    """Make the planned micro-batches in a thread, at most `ahead` before their use, asking for their rewards at once."""
    ready: queue.Queue[Ready | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: Ready | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for numbers, step_rows in plan:
                if stop.is_set():
                    return
                batch = make(numbers, step_rows)
                put(
                    Ready(
                        batch,
                        rewards.fetch_async(batch.users, batch.positions)
                        if rewards is not None
                        else None,
                    )
                )
            put(None)
        except BaseException as error:  # handed to the training thread, which raises it
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=10)
        sys.setswitchinterval(interval)
