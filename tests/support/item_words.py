"""Small data sets of items with texts."""

from __future__ import annotations

import numpy as np

from ilrec_dist.data.dataset import InteractionDataset


def toy(num_items=4, titles=None) -> InteractionDataset:
    return InteractionDataset(
        np.arange(num_items, dtype=np.int32),
        np.array([0, num_items]),
        ["u"],
        [str(10 * item) for item in range(num_items)],
        titles,
    )


def words(num_items, seed=0):
    random = np.random.default_rng(seed)
    return [
        f"group{item % 8} shared{item % 8} kind{item % 24} "
        + " ".join(f"w{w}" for w in random.integers(200, size=3))
        for item in range(num_items)
    ]
