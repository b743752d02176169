"""Cuts the users' training histories into windows and orders them into optimizer steps, the same on every rank and on every resume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilrec_dist.data.prepared import Prepared

BUCKET_STEPS = 16  # windows are sorted by length within this many steps' worth, so that a batch holds similar lengths


@dataclass(frozen=True)
class Windows:
    """Slices of users' histories (METHOD.md §1). Window w holds items [start, stop) of its user's sequence; those from `target` on are targets.

    user, start, target, stop: int64 [W]; start < target < stop.
    """

    user: np.ndarray
    start: np.ndarray
    target: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> Windows:
        return Windows(self.user[index], self.start[index], self.target[index], self.stop[index])

    @property
    def num_targets(self) -> int:
        return int((self.stop - self.target).sum())


def training_windows(prepared: Prepared, max_history: int, targets: str) -> Windows:
    """The windows in which every training item of a user except the first is a target exactly once.

    `targets: all`: windows of at most max_history + 1 items. A longer history is cut into windows that overlap by half of max_history;
    the overlap is context, its items are not targets again. `targets: last`: one window per target, with up to max_history items before it.
    """
    lengths = np.diff(prepared.offsets) - 2  # the last two items are the validation and the test target
    if targets == "last":
        counts = np.maximum(lengths - 1, 0)
        user = np.repeat(np.arange(len(lengths)), counts)
        target = _counter(counts) + 1
        return Windows(user, np.maximum(target - max_history, 0), target, target + 1)
    size = max_history + 1
    overlap = max(max_history // 2, 1)
    fresh = size - overlap  # targets that each further window adds
    counts = np.where(lengths < 2, 0, 1 + np.maximum(0, -((size - lengths) // fresh)))
    user = np.repeat(np.arange(len(lengths)), counts)
    start = _counter(counts) * fresh
    stop = np.minimum(start + size, lengths[user])
    return Windows(user, start, np.where(start == 0, 1, start + overlap), stop)


def _counter(counts: np.ndarray) -> np.ndarray:
    """[2, 3] → [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def steps_per_epoch(windows: Windows, batch_size: int) -> int:
    return -(-len(windows) // batch_size)


def epoch_steps(windows: Windows, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The window numbers of each optimizer step of an epoch: a function of (seed, epoch) alone.

    Windows are permuted, sorted by length within buckets of BUCKET_STEPS steps, cut into steps, and the steps permuted.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(windows))
    length = windows.stop - windows.start
    bucket = batch_size * BUCKET_STEPS
    chunks: list[np.ndarray] = []
    for low in range(0, len(order), bucket):
        part = order[low : low + bucket]
        part = part[np.argsort(length[part], kind="stable")]
        chunks += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [chunks[i] for i in rng.permutation(len(chunks))]
