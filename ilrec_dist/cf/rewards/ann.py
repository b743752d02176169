"""Nearest items by inner product: FAISS indexes of several kinds behind build, save, load and search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

ADD_AT_ONCE = 1 << 18
TRAIN_PER_LIST = 40  # vectors per inverted list that k-means sees
HNSW_LINKS = 32


def build_index(
    kind: str, vectors: np.ndarray, rows: np.ndarray | None = None, seed: int = 0
) -> Any:
    """A FAISS index over rows of vectors [·, d] (fp16 or fp32, memory-mapped if need be): the n given ones, or all; ids 0 … n−1 in their order.

    kind "flat", "ivf_pq" or "hnsw"; ivf_pq keeps d/2 four-bit codes per item: its scores are rough and to be replaced by exact ones.
    """
    n, d = len(vectors) if rows is None else len(rows), vectors.shape[1]

    def block(which: Any) -> np.ndarray:
        return np.ascontiguousarray(
            vectors[which if rows is None else rows[which]], dtype=np.float32
        )

    index: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(d)
    elif kind == "hnsw":
        index = faiss.index_factory(d, f"HNSW{HNSW_LINKS}_SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.train(np.zeros((1, d), np.float32))  # half precision has nothing to learn
    elif kind == "ivf_pq":
        lists = num_lists(n)
        parts = d // 2 if d % 2 == 0 else d
        index = faiss.index_factory(d, f"IVF{lists},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.pq.cp.seed = seed + 1, seed + 1
        sample = np.sort(
            np.random.default_rng(seed).permutation(n)[: max(lists * TRAIN_PER_LIST, 1024)]
        )
        index.train(block(sample))
    else:
        raise ValueError(f"index kind {kind!r}: expected flat, ivf_pq or hnsw")
    for start in range(0, n, ADD_AT_ONCE):
        index.add(block(slice(start, start + ADD_AT_ONCE)))
    return index


def num_lists(n: int) -> int:
    """Inverted lists of an ivf_pq index over n vectors: about 1.5 √n, a power of two, at most 4096."""
    lists = max(1, 1 << round(math.log2(max(1.0, 1.5 * math.sqrt(n)))))
    return min(lists, 4096, max(1, n // TRAIN_PER_LIST))


def num_probes(lists: int, n: int, k: int, width: int) -> int:
    """Lists that a search for k of n items looks into: those that hold about width × k, at least 2."""
    return min(lists, max(2, math.ceil(width * k * lists / max(1, n))))


def save_index(index: Any, path: Path) -> None:
    faiss.write_index(index, str(path))


def load_index(path: Path) -> Any:
    """On this process's GPU when faiss has one and the kind runs there."""
    index = faiss.read_index(str(path))
    if num_gpus() > 0 and isinstance(index, faiss.IndexFlatIP):
        return faiss.index_cpu_to_gpus_list(
            index, gpus=[torch.cuda.current_device() if torch.cuda.is_available() else 0]
        )  # the other workers have theirs
    return index


def num_gpus() -> int:
    """GPUs that faiss sees; 0 for a build without GPU support."""
    return int(getattr(faiss, "get_num_gpus", lambda: 0)())


def search(index: Any, queries: np.ndarray, k: int, width: int = 8) -> np.ndarray:
    """Ids int64 [t, k] of about the k largest inner products, in no particular order; −1 where fewer were found.

    width × k is about how many items are looked at: more is slower and misses less.
    """
    base = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    if isinstance(base, faiss.IndexIVF):
        base.nprobe = num_probes(base.nlist, base.ntotal, k, width)
    elif isinstance(base, faiss.IndexHNSW):
        base.hnsw.efSearch = k + k // 4
    return base.search(np.ascontiguousarray(queries, dtype=np.float32), min(k, base.ntotal))[1]
