"""Training or not, and whose: of every interaction, the plain way."""

from __future__ import annotations

import numpy as np

from ilrec_dist.data.dataset import InteractionDataset


def train_mask(dataset: InteractionDataset) -> np.ndarray:
    """bool [T] interactions of the training split."""
    return np.concatenate(
        [
            np.arange(length) < train
            for length, train in zip(dataset.lengths(), dataset.train_lengths(), strict=True)
        ]
    )


def user_of_interaction(dataset: InteractionDataset) -> np.ndarray:
    """int64 [T] the user of every interaction."""
    return np.repeat(np.arange(dataset.num_users), dataset.lengths())
