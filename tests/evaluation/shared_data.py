"""The real data sets beside the repository, where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.data.files import read_json_object
from ilrec_dist.data.prepared import Prepared

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def real_data(name: str) -> Prepared:
    """The LC-Rec triple's histories as they stand in the file; skips the test where the folder is absent."""
    files = list((SHARED / name).glob("*.inter.json"))
    if not files:
        pytest.skip(f"{SHARED / name} is absent")
    sequences = list(read_json_object(files[0]).values())
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    items = np.concatenate(sequences).astype(np.int32)
    return Prepared(items, offsets, [str(user) for user in range(len(sequences))], [str(item) for item in range(items.max() + 1)])
