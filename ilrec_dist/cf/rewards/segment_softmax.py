"""Ragged arrays: sums, maxima and shares over contiguous segments of a flat array."""

from __future__ import annotations

import numpy as np
import torch


def child_masses(
    scores: np.ndarray, row_lengths: np.ndarray, child_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(Σ exp(score − top) of each child, float32 [K]; top of each row, float32 [R]).

    scores float32: R rows one after another, row_lengths int64 [R] ≥ 1 of them; each row is cut, without gaps, into segments of child_lengths
    int64 [K] ≥ 1. A score of −inf has no mass; top is the row's maximum, 0 where that is −inf. Sums are taken segment by segment, never as
    differences of running ones.
    """
    top = np.maximum.reduceat(scores, np.cumsum(row_lengths) - row_lengths)
    top[np.isneginf(top)] = 0
    mass = torch.from_numpy(scores - np.repeat(top, row_lengths)).exp_().numpy()
    return np.add.reduceat(mass, np.cumsum(child_lengths) - child_lengths), top


def child_shares(
    scores: np.ndarray, row_lengths: np.ndarray, child_lengths: np.ndarray, children: np.ndarray
) -> np.ndarray:
    """Softmax mass of each child within its row, float32 [K]; arguments as of child_masses, children int64 [R] ≥ 1 segments in each row.

    A row without mass gets zeros. The shift is the row's own, so a prefix of little mass loses no digits to the rest of the catalogue.
    """
    child, _ = child_masses(scores, row_lengths, child_lengths)
    total = np.add.reduceat(child, np.cumsum(children) - children)
    return child / np.repeat(np.where(total > 0, total, np.float32(1)), children)


def softmax_rows(logs: np.ndarray) -> np.ndarray:
    """exp(log) of each row of float32 [t, c] over the row's sum; zeros where all are −inf."""
    top = logs.max(1, keepdims=True, initial=-np.inf)
    mass = np.exp(logs - np.where(np.isfinite(top), top, np.float32(0)))
    total = mass.sum(1, keepdims=True)
    return mass / np.where(total > 0, total, np.float32(1))
