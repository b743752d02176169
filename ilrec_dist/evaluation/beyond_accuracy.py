"""Properties of recommended lists beside accuracy: coverage, Gini, novelty, diversity,
calibration.

All are of the first LIST_LENGTH items of each
user's list. Lists that are empty count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.items.catalogue import Catalogue

LIST_LENGTH = 10
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class ItemFacts:
    """What the measures know of the items."""

    # int64 [num_items]: interactions of each item in training.
    popularity: np.ndarray
    # int32 [num_items, C]: the token ids of each item; two items are alike by their prefix.
    tokens: np.ndarray

    @cached_property
    def sharing(self) -> np.ndarray:
        """int64 [num_items]: the items that have an item's tokens, itself included."""
        _, group, size = np.unique(self.tokens, axis=0, return_inverse=True, return_counts=True)
        sharing: np.ndarray = size[group.ravel()]
        return sharing

    @staticmethod
    def of(popularity: np.ndarray, catalogue: Catalogue) -> ItemFacts:
        return ItemFacts(popularity, catalogue.item_tokens(np.arange(catalogue.num_items)))


def beyond_accuracy(
    predictions: Predictions, facts: ItemFacts, scores_are_of_codes: bool
) -> dict[str, float]:
    """The measures of one method's lists, by their names in results.json.

    Scores of a language model are of code tuples, and items of one tuple share its
    probability. `calibration_error` is left out where scores are no log p.
    """
    items = predictions.items[:, :LIST_LENGTH].astype(np.int64)
    figures = {
        "coverage@10": coverage(items, len(facts.popularity)),
        "gini@10": gini(items, len(facts.popularity)),
        "novelty@10": novelty(items, facts.popularity),
        "diversity@10": diversity(items, facts.tokens),
    }
    scores = predictions.scores[:, :LIST_LENGTH].astype(np.float64)
    hits = items == predictions.targets[:, None]
    if scores_are_of_codes:
        scores = scores - np.log(facts.sharing[np.maximum(items, 0)])
    if scores_are_of_codes or predictions.scores_are_log_p:
        figures["calibration_error"] = calibration_error(items >= 0, np.exp(scores), hits)
    return figures


def coverage(items: np.ndarray, num_items: int) -> float:
    """The share of the catalogue that occurs in some list, int [n, W]
    padded with -1.
    """
    return len(np.unique(items[items >= 0])) / num_items


def gini(items: np.ndarray, num_items: int) -> float:
    """The Gini coefficient of how often each item of the catalogue is listed.

    0 where every item is listed equally often, (num_items − 1)
    / num_items where one item takes all places. With ascending
    counts c_1 … c_n: Σ (2i − n − 1)·c_i / (n·Σ c_i).
    """
    counts = np.sort(np.bincount(items[items >= 0], minlength=num_items))
    total = counts.sum()
    if total == 0:
        return 0.0
    weight = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float((weight * counts).sum() / (num_items * total))


def novelty(items: np.ndarray, popularity: np.ndarray) -> float:
    """The mean self-information −log₂ p(i) in bits of listed items.

    p(i) = (pop_i + 1) / (Σ pop + num_items): the share of an item
    in the training interactions, smoothed so that an item without
    any has a finite value. The mean is over listed places.
    """
    p = (popularity + 1) / (popularity.sum() + len(popularity))
    recommended = items[items >= 0]
    return float(-np.log2(p[recommended]).mean()) if len(recommended) else 0.0


def diversity(items: np.ndarray, tokens: np.ndarray) -> float:
    """The mean dissimilarity of the pairs of a list, by the items' token sequences.

    The similarity of two items is the share of leading tokens that they
    have in common: 1 for one code tuple, 0 for different first codes. The
    mean is over pairs of a list, then over the lists that have a pair.
    """
    is_item = items >= 0
    shared = np.zeros(len(items))
    for first in range(items.shape[1]):
        for second in range(first + 1, items.shape[1]):
            pair = is_item[:, first] & is_item[:, second]
            equal = tokens[items[:, first]] == tokens[items[:, second]]
            prefix = np.cumprod(equal, axis=1).sum(axis=1) / tokens.shape[1]
            shared += np.where(pair, prefix, 0.0)
    length = is_item.sum(axis=1)
    pairs = length * (length - 1) / 2
    has_pair = pairs > 0
    if not has_pair.any():
        return 0.0
    return float((1 - shared[has_pair] / pairs[has_pair]).mean())


def calibration_error(is_item: np.ndarray, probabilities: np.ndarray, hits: np.ndarray) -> float:
    """The expected calibration error of the probabilities of listed items.

    Each [n, W]: bool where a place of a list has an item, float its probability of
    being the target, bool whether it is. Places are grouped by probability into
    CALIBRATION_BINS bins of equal width; the error is the mean over places of |mean
    probability − share of targets| of their bin.
    """
    probability, hit = probabilities[is_item], hits[is_item]
    if len(probability) == 0:
        return 0.0
    bins = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    difference = np.bincount(bins, probability - hit, minlength=CALIBRATION_BINS)
    return float(np.abs(difference).sum() / len(probability))
