"""Softmax over contiguous segments of a flat array, and over rows."""

from __future__ import annotations

import numpy as np
import torch


def child_masses(
    scores: np.ndarray, row_lengths: np.ndarray, child_lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(Σ exp(score − row max) of each child, float32 [K]; row max, float32 [R]).

    scores float32: R rows one after another, of row_lengths int64 [R] ≥ 1; each row is
    divided, without gaps, into segments of child_lengths int64 [K] ≥ 1. A score of −inf
    has no mass; the row max is 0 where all scores are −inf. Sums are taken segment by
    segment, never as differences of running ones.
    """
    row_max = np.maximum.reduceat(scores, np.cumsum(row_lengths) - row_lengths)
    row_max[np.isneginf(row_max)] = 0
    mass = torch.from_numpy(scores - np.repeat(row_max, row_lengths)).exp_().numpy()
    return np.add.reduceat(mass, np.cumsum(child_lengths) - child_lengths), row_max


def child_shares(
    scores: np.ndarray, row_lengths: np.ndarray, child_lengths: np.ndarray, children: np.ndarray
) -> np.ndarray:
    """Softmax mass of each child within its row, float32 [K].

    Arguments as of `child_masses`; children int64 [R] ≥ 1: segments in each row. A row
    without mass gets zeros. The shift is the row's own, so a prefix of little mass
    loses no digits to the rest of the catalogue.
    """
    masses, _ = child_masses(scores, row_lengths, child_lengths)
    totals = np.add.reduceat(masses, np.cumsum(children) - children)
    shares: np.ndarray = masses / np.repeat(np.where(totals > 0, totals, np.float32(1)), children)
    return shares


def softmax_rows(logs: np.ndarray) -> np.ndarray:
    """Softmax of each row of float32 [t, c]; zeros where all are −inf."""
    row_max = logs.max(1, keepdims=True, initial=-np.inf)
    mass = np.exp(logs - np.where(np.isfinite(row_max), row_max, np.float32(0)))
    total = mass.sum(1, keepdims=True)
    shares: np.ndarray = mass / np.where(total > 0, total, np.float32(1))
    return shares
