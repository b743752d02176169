"""The flat index searched on a GPU finds what the CPU finds. Skipped where faiss has no
GPU.
"""

from pathlib import Path

import faiss
import numpy as np
import pytest

from ilrec_dist.cf.rewards.ann import (
    build_ann_index,
    load_ann_index,
    num_gpus,
    save_ann_index,
    search_ann_index,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(num_gpus() == 0, reason="faiss sees no GPU")]


def test_the_flat_index_finds_the_same_items_on_the_device(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = (
        rng.normal(size=(5000, 64)).astype(np.float32),
        rng.normal(size=(40, 64)).astype(np.float32),
    )
    index = build_ann_index("flat", vectors)
    save_ann_index(index, tmp_path / "index.faiss")
    there = load_ann_index(tmp_path / "index.faiss")
    assert not isinstance(faiss.downcast_index(there), faiss.IndexFlatIP)
    here = np.sort(search_ann_index(index, queries, 80))
    # Rounding may swap the last items.
    assert (here == np.sort(search_ann_index(there, queries, 80))).mean() > 0.999
