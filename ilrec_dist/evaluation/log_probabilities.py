"""Log probabilities of items, from the scores
that items are ranked by (METHOD.md §9, §12).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Maps the scores of all items, float [n, num_items], to their log p, float64. Where one score
# is greater than another, its log p is not less.
LogP = Callable[[np.ndarray], np.ndarray]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """log p of logits float [n, num_items] over the catalogue, float64."""
    shifted = scores - scores.max(axis=1, keepdims=True).astype(np.float64)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def log_of_counts(scores: np.ndarray) -> np.ndarray:
    """log p of scores ≥ 0 float [n, num_items], to each of which 1/n is added, over n
    items.
    """
    smoothed = scores + 1.0 / scores.shape[1]
    result: np.ndarray = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
    return result


def log_of_probabilities(scores: np.ndarray) -> np.ndarray:
    """log p of scores that are probabilities, float [n, num_items]; -inf where they
    are 0.
    """
    with np.errstate(divide="ignore"):
        result: np.ndarray = np.log(scores.astype(np.float64))
    return result


def listed_log_p(columns: np.ndarray, scores: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """float32 [n, W]: log p of what is listed, in the order and the ties of its scores.

    columns int [n, W]: of the columns of `scores` and `log_p`, float [n, K], those that
    are listed, best first, padded with -1, where the result is -inf. Scores that differ
    by less than float32 shows of their log p are put one step of it apart.
    """
    at = np.maximum(columns, 0)
    scores = np.take_along_axis(scores, at, axis=1)
    result: np.ndarray = np.take_along_axis(log_p, at, axis=1).astype(np.float32)
    for rank in range(1, result.shape[1]):
        above = result[:, rank - 1]
        below = np.minimum(result[:, rank], np.nextafter(above, np.float32(-np.inf)))
        result[:, rank] = np.where(scores[:, rank] == scores[:, rank - 1], above, below)
    result[columns < 0] = -np.inf
    return result
