"""Cuts users' training histories into windows and orders samples into optimizer steps.

The order is the same on every rank and on every resume. Nothing here is as long as the
interactions: a process holds 8 bytes a user (the number of each user's first window)
and, during an epoch, 4 bytes a window (their order). The items of a step's windows are
read from the memory-mapped sequences when the step is made. 10⁹ interactions of 10⁸
users take 0.8 GB and, with `targets: all` and histories that fit the window, 0.4 GB;
the 4 GB file of items is shared by all processes of a machine.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np

from ilrec_dist.data.dataset import InteractionDataset

# Windows are sorted by length within this many steps' worth, so that a step holds windows of
# similar lengths.
BUCKET_STEPS = 16

Targets = Literal["all", "last"]


class SampleSet(Protocol):
    """The samples that an epoch goes through."""

    def __len__(self) -> int:
        """The samples of one epoch."""
        ...

    def of_epoch(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """int64 [n]: the ids of an epoch's samples,
        which are numbered from 0 in each epoch.
        """
        ...

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: how long the samples with these
        ids are; those of a step are made alike.
        """
        ...


@dataclass(frozen=True)
class WindowSlices:
    """Slices of users' histories (METHOD.md §1), one per window.

    A window is items [start, stop) of the user's sequence, those from
    `target` on are targets. All are int64 [n]; start < target < stop.
    """

    user: np.ndarray
    start: np.ndarray
    target: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n] items of each window."""
        lengths: np.ndarray = self.stop - self.start
        return lengths

    @property
    def num_targets(self) -> int:
        return int((self.stop - self.target).sum())


@dataclass(frozen=True)
class Windows:
    """All training windows, numbered by user, then by position in the user's sequence.

    A window is its number until `slices` reads where it lies.
    """

    dataset: InteractionDataset
    max_history: int
    targets: Targets
    # int64 [U + 1]: user u has the windows first[u] … first[u + 1] - 1.
    first: np.ndarray

    def __len__(self) -> int:
        return int(self.first[-1])

    def of_epoch(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """The windows themselves: they are the same in every epoch."""
        return numbers

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [n] items of each window."""
        return self.slices(sample_ids).lengths

    def slices(self, window_ids: np.ndarray) -> WindowSlices:
        """Where the windows with these numbers (int [n]) lie."""
        user = np.searchsorted(self.first, window_ids, side="right") - 1
        ordinal = window_ids - self.first[user]
        if self.targets == "last":
            target = ordinal + 1
            start = np.maximum(target - self.max_history, 0)
            return WindowSlices(user, start, target, target + 1)
        size, overlap = _window_size(self.max_history)
        start = ordinal * (size - overlap)
        stop = np.minimum(start + size, self.dataset.train_lengths(user))
        return WindowSlices(user, start, np.where(start == 0, 1, start + overlap), stop)


def training_windows(
    dataset: InteractionDataset,
    max_history: int,
    targets: Targets,
    users: np.ndarray | None = None,
) -> Windows:
    """Windows in which every training item of a
    user except the first is a target exactly once.

    `targets: all` gives windows of at most max_history + 1 items. A longer history is
    cut into windows that overlap by half of max_history; the overlap is context, its
    items are not targets again. `targets: last` gives one window per target, with up to
    max_history items before it. With `users`, bool [U], the others have no window.
    """
    lengths = dataset.train_lengths()
    if targets == "last":
        counts = np.maximum(lengths - 1, 0)
    else:
        size, overlap = _window_size(max_history)
        # Every further window adds size - overlap targets; the quotient is rounded up.
        further = -((size - lengths) // (size - overlap))
        counts = np.where(lengths < 2, 0, 1 + np.maximum(0, further))
    if users is not None:
        counts = np.where(users, counts, 0)
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Windows(dataset, max_history, targets, first)


def _window_size(max_history: int) -> tuple[int, int]:
    """Items of a full window, and how many of them it shares with the window before."""
    return max_history + 1, max(max_history // 2, 1)


def steps_per_epoch(samples: Sized, batch_size: int) -> int:
    return -(-len(samples) // batch_size)


class EpochSteps(Sequence[np.ndarray]):
    """The sample numbers (int64) of each optimizer step of an epoch.

    They are a function of (seed, epoch) alone: samples are permuted, sorted
    by length within buckets of BUCKET_STEPS steps, cut into steps, and the
    steps permuted. A step is worked out from its bucket when it is asked for.
    """

    def __init__(self, samples: SampleSet, batch_size: int, seed: int, epoch: int) -> None:
        self.samples, self.batch_size, self.epoch = samples, batch_size, epoch
        rng = np.random.default_rng([seed, epoch])
        dtype = np.int32 if len(samples) < 2**31 else np.int64
        self.order = rng.permutation(np.arange(len(samples), dtype=dtype))
        self.steps = rng.permutation(steps_per_epoch(samples, batch_size))

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        bucket, step = divmod(int(self.steps[index]), BUCKET_STEPS)
        low = bucket * BUCKET_STEPS * self.batch_size
        sample_ids = self.order[low : low + BUCKET_STEPS * self.batch_size].astype(np.int64)
        sample_ids = self.samples.of_epoch(sample_ids, self.epoch)
        sizes = self.samples.sizes(sample_ids)
        sample_ids = sample_ids[np.argsort(sizes, kind="stable")]
        return sample_ids[step * self.batch_size : (step + 1) * self.batch_size]


class StepOrder:
    """The samples of every optimizer step of a training, epoch after epoch."""

    def __init__(self, samples: SampleSet, batch_size: int, epochs: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.steps_per_epoch = steps_per_epoch(samples, batch_size)
        self.total_steps = self.steps_per_epoch * epochs
        self._epoch = -1
        self._epoch_steps: Sequence[np.ndarray] = ()

    def sample_ids(self, step: int) -> np.ndarray:
        """int64 [≤ batch_size]; steps count from 0. The order of one epoch is kept."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch_steps = EpochSteps(self.samples, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return self._epoch_steps[index]
