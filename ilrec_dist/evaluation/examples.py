"""Users whose lists the report shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.reporting.html.examples import Example

EXAMPLE_SEED = 5
# Items of a list that are kept for the report.
SHOWN_ITEMS = 10


def collect_examples(
    dataset: InteractionDataset, predictions: Mapping[str, Predictions], count: int
) -> list[Example]:
    """`count` evaluated users, drawn with a fixed seed, with the lists of each model;
    there is at least one model.
    """
    evaluated = next(iter(predictions.values())).users
    order = np.random.default_rng(EXAMPLE_SEED).permutation(len(evaluated))
    users = np.sort(evaluated[order[:count]])
    return [_example(dataset, int(user), predictions) for user in users]


def _example(
    dataset: InteractionDataset, user: int, predictions: Mapping[str, Predictions]
) -> Example:
    def title(item: int) -> str:
        name = dataset.titles[item] if dataset.titles else ""
        return f"{name} [{dataset.item_ids[item]}]" if name else dataset.item_ids[item]

    users = np.array([user])
    history = dataset.items[dataset.offsets[user] : int(dataset.history_stop("test", users)[0])]
    lists = {}
    for method, lists_of_method in predictions.items():
        row = int(np.searchsorted(lists_of_method.users, user))
        pairs = zip(lists_of_method.items[row], lists_of_method.scores[row], strict=True)
        shown = [(title(int(item)), float(score)) for item, score in pairs if item >= 0]
        lists[method] = shown[:SHOWN_ITEMS]
    return Example(
        dataset.user_ids[user],
        [title(int(item)) for item in history],
        title(int(dataset.targets("test", users)[0])),
        lists,
    )
