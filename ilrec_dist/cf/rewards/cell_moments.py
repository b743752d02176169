"""Cell moments: the softmax mass of many items estimated from the mean and the covariance of their vectors (METHOD.md §5, large catalogues)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

RANK = 8  # of the covariances kept; the rest of each is kept as a diagonal
CELLS_AT_ONCE = 2048


@dataclass(frozen=True)
class CellMoments:
    """Of some nodes of one depth, ascending: how many known items each covers, their mean vector, and the covariance as factorᵀ·factor + diag."""

    nodes: np.ndarray  # int64 [m]
    count: np.ndarray  # float32 [m]
    mean: torch.Tensor  # fp32 [m, d]
    factor: torch.Tensor  # fp32 [m, r, d]
    diagonal: torch.Tensor  # fp32 [m, d]

    def scores(
        self, first: int, stop: int, queries: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count [c], and mean and variance [t, c] of the scores q·e of the items below nodes first … stop − 1, all of which must be kept here."""
        low = int(np.searchsorted(self.nodes, first))
        cells = slice(low, low + stop - first)
        factor = self.factor[cells]
        spread = (
            (queries @ factor.reshape(-1, factor.shape[2]).t())
            .square_()
            .view(len(queries), factor.shape[0], -1)
            .sum(2)
        )
        spread.addmm_(queries.square(), self.diagonal[cells].t())
        return self.count[cells], (queries @ self.mean[cells].t()).numpy(), spread.numpy()

    def save(self, path: Path) -> None:
        np.savez(
            path,
            nodes=self.nodes,
            count=self.count,
            mean=self.mean.numpy(),
            factor=self.factor.half().numpy(),
            diagonal=self.diagonal.numpy(),
        )

    @staticmethod
    def load(path: Path) -> CellMoments:
        with np.load(path) as file:
            tensors = [
                torch.from_numpy(file[name].astype(np.float32))
                for name in ("mean", "factor", "diagonal")
            ]
            return CellMoments(file["nodes"], file["count"], *tensors)


def cell_moments(
    vectors: torch.Tensor, known: torch.Tensor, node_start: np.ndarray, nodes: np.ndarray
) -> CellMoments:
    """Moments of the known items below each of `nodes` (ascending): node j covers the rows [node_start[j], node_start[j + 1]) of vectors [n, d]."""
    d = vectors.shape[1]
    count, mean = torch.zeros(len(nodes)), torch.zeros(len(nodes), d)
    factor, diagonal = torch.zeros(len(nodes), min(RANK, d), d), torch.zeros(len(nodes), d)
    for begin in range(0, len(nodes), CELLS_AT_ONCE):
        part = nodes[begin : begin + CELLS_AT_ONCE]
        covariance = torch.zeros(len(part), d, d)
        for i, node in enumerate(part):
            rows = slice(int(node_start[node]), int(node_start[node + 1]))
            inside = vectors[rows].float()[known[rows]]
            if len(inside):
                count[begin + i], mean[begin + i] = len(inside), inside.mean(0)
                inside -= mean[begin + i]
                covariance[i] = inside.t() @ inside / len(inside)
        values, axes = torch.linalg.eigh(covariance)
        top = values[:, -factor.shape[1] :].clamp(min=0).sqrt()
        kept = axes[:, :, -factor.shape[1] :] * top[:, None, :]
        factor[begin : begin + len(part)] = kept.transpose(1, 2)
        diagonal[begin : begin + len(part)] = (
            covariance.diagonal(dim1=1, dim2=2) - kept.square().sum(2)
        ).clamp(min=0)
    return CellMoments(nodes.astype(np.int64), count.numpy(), mean, factor, diagonal)


def log_masses(
    count: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    cell: np.ndarray,
    score: np.ndarray,
    cap: np.ndarray,
) -> np.ndarray:
    """log Σ exp(score) of each cell, float32 [t, c]: the items scored one by one, plus an estimate of the cell's others.

    count [c] or [t, c], mean and variance [t, c] describe all scores of a cell; cell int64 and score float32 [t, k] are the items scored exactly
    (cell −1: none); cap float32 [t] bounds every other score. The others of a cell have the moments that remain when the exact ones are taken out,
    and the mass n·exp(mean + variance / 2), at most n·exp(cap). −inf for a cell of no items.
    """
    t, c = mean.shape
    row, column = np.nonzero(cell >= 0)
    flat = row * c + cell[row, column]
    exact = score[row, column].astype(np.float64)
    taken = np.bincount(flat, minlength=t * c)
    touched = np.flatnonzero(
        taken
    )  # few cells hold an item that was scored exactly; only these need the digits of fp64

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(flat, weights, minlength=t * c)

    others = np.array(np.broadcast_to(count, (t, c)), np.float32)
    estimate = mean + variance / 2
    items, mean_there = (
        others.ravel()[touched].astype(np.float64),
        mean.ravel()[touched].astype(np.float64),
    )
    rest = np.maximum(items - taken[touched], 0)
    rest_mean = (items * mean_there - total(exact)[touched]) / np.maximum(rest, 1)
    rest_square = (
        items * (variance.ravel()[touched] + mean_there**2) - total(exact * exact)[touched]
    ) / np.maximum(rest, 1)
    np.put(estimate, touched, rest_mean + np.maximum(rest_square - rest_mean * rest_mean, 0) / 2)
    np.put(others, touched, rest)
    estimate = np.minimum(estimate, cap[:, None])
    shift = np.where(others > 0, estimate, -np.inf).max(1, initial=-np.inf)
    shift = np.maximum(shift, np.where(cell >= 0, score, -np.inf).max(1, initial=-np.inf))
    shift = np.where(np.isfinite(shift), shift, 0).astype(np.float32)
    mass = others * np.exp(np.minimum(estimate - shift[:, None], 0)) + total(
        np.exp(exact - shift[row])
    ).reshape(t, c)
    with np.errstate(divide="ignore"):
        return (np.log(mass) + shift[:, None]).astype(np.float32)
