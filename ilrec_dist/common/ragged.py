"""Ragged arrays: positions within contiguous segments of a flat array."""

from __future__ import annotations

import numpy as np


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """0 … c−1 for each count c, concatenated; int64."""
    ends = np.cumsum(counts)
    total = ends[-1] if len(ends) else 0
    positions: np.ndarray = np.arange(total) - np.repeat(ends - counts, counts)
    return positions


def ragged_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start … start + count − 1 of each range, concatenated; int64."""
    return ragged_csr(starts, counts)[1]


def ragged_csr(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R ranges in CSR form: (indptr int64 [R+1], `ragged_ranges` int64)."""
    indptr = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr, np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], counts)
