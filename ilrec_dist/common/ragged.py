"""Ragged arrays: positions within contiguous segments of a flat array."""

from __future__ import annotations

import numpy as np


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """0 … c−1 for each count c, concatenated; int64."""
    ends = np.cumsum(counts)
    positions: np.ndarray = np.arange(ends[-1] if len(ends) else 0)
    return positions - np.repeat(ends - counts, counts)


def ragged_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start … start + count − 1 of each range, concatenated; int64."""
    first: np.ndarray = np.repeat(starts, counts)
    return first + ragged_arange(counts)
