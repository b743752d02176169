"""The real data sets' histories."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ilrec_dist.common.files import read_json_object
from ilrec_dist.data.dataset import InteractionDataset
from tests.support.shared_data import shared_data


@lru_cache
def real_data(name: str) -> InteractionDataset:
    """The histories of the LC-Rec triple; skips the test where the folder is absent."""
    (file,) = shared_data(name).glob("*.inter.json")
    sequences = list(read_json_object(file).values())
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    items = np.concatenate(sequences).astype(np.int32)
    return InteractionDataset(
        items,
        offsets,
        [str(user) for user in range(len(sequences))],
        [str(item) for item in range(items.max() + 1)],
    )
