"""Cuts the users' training histories into windows and orders them into optimizer steps, the same on every rank and on every resume.

Nothing here is as long as the interactions: a process holds 8 bytes a user (which window is whose first) and, during an epoch, 4 bytes a window (their
order); the items of a step's windows are read from the mapped sequences when the step is made. 10⁹ interactions of 10⁸ users: 0.8 and, with
`targets: all` and histories that fit the window, 0.4 GB; a 4 GB file of items that all processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ilrec_dist.data.dataset import InteractionDataset

BUCKET_STEPS = 16  # windows are sorted by length within this many steps' worth, so that a batch holds similar lengths


@dataclass(frozen=True)
class Slices:
    """Slices of users' histories (METHOD.md §1): items [start, stop) of the user's sequence; those from `target` on are targets.

    user, start, target, stop: int64 [n]; start < target < stop.
    """

    user: np.ndarray
    start: np.ndarray
    target: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_targets(self) -> int:
        return int((self.stop - self.target).sum())


@dataclass(frozen=True)
class Windows:
    """All training windows, numbered by user and place; made into slices only when taken."""

    dataset: InteractionDataset
    max_history: int
    targets: str
    first: np.ndarray  # int64 [U + 1]: user u has the windows first[u] … first[u + 1] - 1

    def __len__(self) -> int:
        return int(self.first[-1])

    def take(self, numbers: np.ndarray) -> Slices:
        """The slices of the windows with these numbers."""
        user = np.searchsorted(self.first, numbers, side="right") - 1
        place = numbers - self.first[user]
        if self.targets == "last":
            target = place + 1
            return Slices(user, np.maximum(target - self.max_history, 0), target, target + 1)
        size, overlap = self.max_history + 1, max(self.max_history // 2, 1)
        start = place * (size - overlap)
        stop = np.minimum(start + size, self.dataset.train_lengths(user))
        return Slices(user, start, np.where(start == 0, 1, start + overlap), stop)


def training_windows(dataset: InteractionDataset, max_history: int, targets: str) -> Windows:
    """The windows in which every training item of a user except the first is a target exactly once.

    `targets: all`: windows of at most max_history + 1 items. A longer history is cut into windows that overlap by half of max_history;
    the overlap is context, its items are not targets again. `targets: last`: one window per target, with up to max_history items before it.
    """
    lengths = dataset.train_lengths()
    if targets == "last":
        counts = np.maximum(lengths - 1, 0)
    else:
        size = max_history + 1
        fresh = size - max(max_history // 2, 1)  # targets that each further window adds
        counts = np.where(lengths < 2, 0, 1 + np.maximum(0, -((size - lengths) // fresh)))
    return Windows(
        dataset, max_history, targets, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    )


def steps_per_epoch(windows: Windows, batch_size: int) -> int:
    return -(-len(windows) // batch_size)


class EpochSteps(Sequence[np.ndarray]):
    """The window numbers (int64) of each optimizer step of an epoch: a function of (seed, epoch) alone.

    Windows are permuted, sorted by length within buckets of BUCKET_STEPS steps, cut into steps, and the steps permuted. A step is worked out when
    it is asked for, from its bucket.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int, epoch: int) -> None:
        self.windows, self.batch_size = windows, batch_size
        rng = np.random.default_rng([seed, epoch])
        dtype = np.int32 if len(windows) < 2**31 else np.int64
        self.order = rng.permutation(np.arange(len(windows), dtype=dtype))
        self.steps = rng.permutation(steps_per_epoch(windows, batch_size))

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        bucket, step = divmod(int(self.steps[place]), BUCKET_STEPS)
        low = bucket * BUCKET_STEPS * self.batch_size
        part = self.order[low : low + BUCKET_STEPS * self.batch_size].astype(np.int64)
        slices = self.windows.take(part)
        part = part[np.argsort(slices.stop - slices.start, kind="stable")]
        return part[step * self.batch_size : (step + 1) * self.batch_size]
