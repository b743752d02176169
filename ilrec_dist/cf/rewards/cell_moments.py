"""Cell moments: the softmax mass of many items, estimated from mean and covariance.

METHOD.md §5, large catalogues.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ilrec_dist.cf.sasrec.checkpoint import require_finite

# The rank of the covariances that is kept; the remainder of each is kept as a diagonal.
RANK = 8
# Cells whose covariances are in memory together.
CHUNK_CELLS = 2048


@dataclass(frozen=True)
class CellMoments:
    """Moments of the known items below some nodes of one depth."""

    # int64 [m], ascending.
    nodes: np.ndarray
    # float32 [m]: known items below each node.
    count: np.ndarray
    # fp32 [m, d]: the mean of their vectors.
    mean: torch.Tensor
    # The covariance is factorᵀ·factor + diag(diagonal): fp32 [m, r, d] and [m, d].
    factor: torch.Tensor
    diagonal: torch.Tensor

    def scores(
        self, first: int, stop: int, queries: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count [c], and mean and variance [t, c] of the scores q·e below c nodes.

        The nodes are first … stop − 1, all of which must be kept here; queries fp32 [t,
        d].
        """
        low = int(np.searchsorted(self.nodes, first))
        cells = slice(low, low + stop - first)
        factor = self.factor[cells]
        projected = (queries @ factor.reshape(-1, factor.shape[2]).t()).square_()
        variance = projected.view(len(queries), factor.shape[0], -1).sum(2)
        variance.addmm_(queries.square(), self.diagonal[cells].t())
        mean = queries @ self.mean[cells].t()
        return self.count[cells], mean.numpy(), variance.numpy()

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
        """What `save` wrote. Raises UserError where a number is not finite."""
        with np.load(path) as file:
            tensors = [
                torch.from_numpy(file[name].astype(np.float32))
                for name in ("mean", "factor", "diagonal")
            ]
            moments = CellMoments(file["nodes"], file["count"], *tensors)
        for tensor in tensors:
            require_finite(tensor, str(path))
        return moments


def cell_moments(
    vectors: torch.Tensor, known: torch.Tensor, node_start: np.ndarray, nodes: np.ndarray
) -> CellMoments:
    """Moments of the known items below each of `nodes` (int64 [m], ascending).

    Node j covers the rows [node_start[j], node_start[j + 1]) of vectors [n, d] and of
    known bool [n].
    """
    d = vectors.shape[1]
    rank = min(RANK, d)
    count, mean = torch.zeros(len(nodes)), torch.zeros(len(nodes), d)
    factor, diagonal = torch.zeros(len(nodes), rank, d), torch.zeros(len(nodes), d)
    for begin in range(0, len(nodes), CHUNK_CELLS):
        chunk = nodes[begin : begin + CHUNK_CELLS]
        covariance = torch.zeros(len(chunk), d, d)
        for i, node in enumerate(chunk):
            rows = slice(int(node_start[node]), int(node_start[node + 1]))
            inside = vectors[rows].float()[known[rows]]
            if len(inside):
                count[begin + i], mean[begin + i] = len(inside), inside.mean(0)
                inside -= mean[begin + i]
                covariance[i] = inside.t() @ inside / len(inside)
        values, axes = torch.linalg.eigh(covariance)
        largest = values[:, -rank:].clamp(min=0).sqrt()
        kept = axes[:, :, -rank:] * largest[:, None, :]
        factor[begin : begin + len(chunk)] = kept.transpose(1, 2)
        remainder = covariance.diagonal(dim1=1, dim2=2) - kept.square().sum(2)
        diagonal[begin : begin + len(chunk)] = remainder.clamp(min=0)
    return CellMoments(nodes.astype(np.int64), count.numpy(), mean, factor, diagonal)


def log_masses(
    count: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    cells: np.ndarray,
    scores: np.ndarray,
    cap: np.ndarray,
) -> np.ndarray:
    """log Σ exp(score) of each cell, float32 [t, c]; −inf for a cell of no items.

    It sums the items scored exactly and an estimate of the cell's other items. count
    [c] or [t, c], mean and variance [t, c] describe all scores of a cell; cells int64
    and scores float32 [t, k] are the items scored exactly (cell −1: none); cap float32
    [t] bounds every other score. The other items of a cell have the moments that remain
    when the exact ones are taken out, and the mass n·exp(mean + variance / 2), at most
    n·exp(cap).
    """
    t, c = mean.shape
    row, column = np.nonzero(cells >= 0)
    flat = row * c + cells[row, column]
    exact = scores[row, column].astype(np.float64)
    num_exact = np.bincount(flat, minlength=t * c)
    # Few cells hold an item that was scored exactly; only these need the digits of fp64.
    touched = np.flatnonzero(num_exact)

    def cell_sums(weights: np.ndarray) -> np.ndarray:
        return np.bincount(flat, weights, minlength=t * c)

    remaining = np.array(np.broadcast_to(count, (t, c)), np.float32)
    estimate = mean + variance / 2
    items = remaining.ravel()[touched].astype(np.float64)
    all_mean = mean.ravel()[touched].astype(np.float64)
    all_square = variance.ravel()[touched] + all_mean**2
    num_inexact = np.maximum(items - num_exact[touched], 0)
    divisor = np.maximum(num_inexact, 1)
    inexact_mean = (items * all_mean - cell_sums(exact)[touched]) / divisor
    inexact_square = (items * all_square - cell_sums(exact * exact)[touched]) / divisor
    inexact_variance = np.maximum(inexact_square - inexact_mean * inexact_mean, 0)
    np.put(estimate, touched, inexact_mean + inexact_variance / 2)
    np.put(remaining, touched, num_inexact)
    estimate = np.minimum(estimate, cap[:, None])
    shift = np.where(remaining > 0, estimate, -np.inf).max(1, initial=-np.inf)
    shift = np.maximum(shift, np.where(cells >= 0, scores, -np.inf).max(1, initial=-np.inf))
    shift = np.where(np.isfinite(shift), shift, 0).astype(np.float32)
    exact_mass = cell_sums(np.exp(exact - shift[row])).reshape(t, c)
    mass = remaining * np.exp(np.minimum(estimate - shift[:, None], 0)) + exact_mass
    with np.errstate(divide="ignore"):
        logs: np.ndarray = (np.log(mass) + shift[:, None]).astype(np.float32)
    return logs
