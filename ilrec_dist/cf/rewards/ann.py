"""Nearest items by inner product: FAISS indexes of several kinds (METHOD.md §5)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ilrec_dist.common.errors import UserError

# Vectors added to an index in one call.
ADD_ROWS = 1 << 18
# Vectors per inverted list that k-means sees.
TRAIN_PER_LIST = 40
HNSW_LINKS = 32


def build_ann_index(
    kind: str, vectors: np.ndarray, rows: np.ndarray | None = None, seed: int = 0
) -> Any:
    """A FAISS index over rows of vectors [·, d], fp16 or fp32, mapped if need be.

    rows int64 [n], all where None; the ids of the index are 0 … n − 1 in their order.
    `kind` is "flat", "ivf_pq" or "hnsw". ivf_pq keeps d/2 four-bit codes per item: its
    scores are rough and to be replaced by exact ones.
    """
    n, d = len(vectors) if rows is None else len(rows), vectors.shape[1]

    def block(where: Any) -> np.ndarray:
        return np.ascontiguousarray(
            vectors[where if rows is None else rows[where]], dtype=np.float32
        )

    index: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(d)
    elif kind == "hnsw":
        index = faiss.index_factory(d, f"HNSW{HNSW_LINKS}_SQfp16", faiss.METRIC_INNER_PRODUCT)
        # Half precision has nothing to learn from the vectors.
        index.train(np.zeros((1, d), np.float32))
    elif kind == "ivf_pq":
        lists = num_lists(n)
        subquantizers = d // 2 if d % 2 == 0 else d
        index = faiss.index_factory(
            d, f"IVF{lists},PQ{subquantizers}x4fs", faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed, index.pq.cp.seed = seed + 1, seed + 1
        shuffled = np.random.default_rng(seed).permutation(n)
        index.train(block(np.sort(shuffled[: max(lists * TRAIN_PER_LIST, 1024)])))
    else:
        raise ValueError(f"index kind {kind!r}: expected flat, ivf_pq or hnsw")
    for start in range(0, n, ADD_ROWS):
        index.add(block(slice(start, start + ADD_ROWS)))
    return index


def num_lists(n: int) -> int:
    """Lists of an ivf_pq index over n vectors: a power of two near 1.5 √n, ≤ 4096."""
    lists = max(1, 1 << round(math.log2(max(1.0, 1.5 * math.sqrt(n)))))
    return min(lists, 4096, max(1, n // TRAIN_PER_LIST))


def num_probes(lists: int, n: int, k: int, width: int) -> int:
    """Lists that a search for k of n items reads: about width × k items, ≥ 2 lists."""
    return min(lists, max(2, math.ceil(width * k * lists / max(1, n))))


def save_ann_index(index: Any, path: Path) -> None:
    faiss.write_index(index, str(path))


def load_ann_index(path: Path) -> Any:
    """Load an index, onto this process's GPU where the kind of index runs there.

    Raises UserError where the file is no FAISS index.
    """
    try:
        index = faiss.read_index(str(path))
    except RuntimeError:
        raise UserError(f"{path}: not a FAISS index; run `ilrec cf` again") from None
    if num_gpus() > 0 and isinstance(index, faiss.IndexFlatIP):
        # The other workers have GPUs of their own.
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return faiss.index_cpu_to_gpus_list(index, gpus=[gpu])
    return index


def num_gpus() -> int:
    """GPUs that faiss sees; 0 for a build without GPU support."""
    return int(getattr(faiss, "get_num_gpus", lambda: 0)())


def search_ann_index(index: Any, queries: np.ndarray, k: int, width: int = 8) -> np.ndarray:
    """Ids int64 [t, k] of about the k largest inner products, in no particular order.

    queries [t, d]; −1 stands where fewer were found. About width × k items are looked
    at: more is slower and misses less.
    """
    base = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    if isinstance(base, faiss.IndexIVF):
        base.nprobe = num_probes(base.nlist, base.ntotal, k, width)
    elif isinstance(base, faiss.IndexHNSW):
        base.hnsw.efSearch = k + k // 4
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    ids: np.ndarray = base.search(queries, min(k, base.ntotal))[1]
    return ids
