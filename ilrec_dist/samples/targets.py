"""Batches of chosen targets, such as those of
the validation, instead of training windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.samples.windows import Windows, WindowSlices


@dataclass(frozen=True)
class ChosenTargets(Windows):
    """One window for each of n targets: its history, then the target."""

    window: WindowSlices

    @staticmethod
    def of_split(
        dataset: InteractionDataset, users: np.ndarray, split: str, max_history: int
    ) -> ChosenTargets:
        """The targets of users int64 [n], who have one, in "validation" or "test"."""
        positions = dataset.target_positions(split, users)
        start = np.maximum(positions - max_history, 0)
        window = WindowSlices(users, start, positions, positions + 1)
        return ChosenTargets(dataset, max_history, "last", np.arange(len(users) + 1), window)

    def slices(self, window_ids: np.ndarray) -> WindowSlices:
        """Those with these numbers (int [n])."""
        window = self.window
        parts = (window.user, window.start, window.target, window.stop)
        return WindowSlices(*(part[window_ids] for part in parts))
