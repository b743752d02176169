"""Ragged arrays: sums, maxima and shares over contiguous segments of a flat array."""

from __future__ import annotations

import numpy as np


def ragged_arange(counts: np.ndarray) -> np.ndarray:
    """0 … c−1 for each count c, concatenated; int64."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def ragged_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start … start + count − 1 of each range, concatenated; int64."""
    return np.repeat(starts, counts) + ragged_arange(counts)


def child_shares(scores: np.ndarray, row_lengths: np.ndarray, child_lengths: np.ndarray, children: np.ndarray) -> np.ndarray:
    """softmax mass of each child within its row: float32 [K].

    scores float32: R rows one after another, row_lengths int64 [R] ≥ 1 of them; each row is cut, without gaps, into `children` int64 [R] ≥ 1
    segments of child_lengths int64 [K] ≥ 1. A score of −inf has no mass; a row of nothing else gets zeros. The shift is the row's own maximum and
    the sums are taken segment by segment, so a prefix of little mass loses no digits to the rest of the catalogue.
    """
    top = np.maximum.reduceat(scores, np.cumsum(row_lengths) - row_lengths)
    mass = np.exp(scores - np.repeat(np.where(np.isfinite(top), top, np.float32(0)), row_lengths))
    child = np.add.reduceat(mass, np.cumsum(child_lengths) - child_lengths)
    total = np.add.reduceat(child, np.cumsum(children) - children)
    return child / np.repeat(np.where(total > 0, total, np.float32(1)), children)
