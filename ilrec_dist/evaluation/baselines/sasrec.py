"""Full-catalogue scores of the SASRec that was trained on all users (METHOD.md §9)."""

from __future__ import annotations

import numpy as np
import torch

from ilrec_dist.cf.sasrec.model import SASRec, encode
from ilrec_dist.data.dataset import InteractionDataset, ItemArray


def sasrec_scores(
    model: SASRec, dataset: InteractionDataset, users: np.ndarray, split: str
) -> np.ndarray:
    """float32 [len(users), num_items]: logits of every item as the target of `split`.

    The history is all that precedes the target of "validation" or "test". Seen
    items keep their scores. All users are scored at once, so callers pass batches
    of them. `model` is that of all training users, as `load_cf` returns it.
    """
    users = np.asarray(users, np.int64)
    return history_sasrec_scores(
        model, dataset.items, dataset.offsets[users], dataset.history_stop(split, users)
    )


@torch.no_grad()
def history_sasrec_scores(
    model: SASRec, items: ItemArray, start: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """The scores of `sasrec_scores` after the histories items[start[r] : stop[r]]."""
    queries = encode(model, items, start, stop - start)
    scores: np.ndarray = (queries @ model.items.weight.t()).numpy()
    return scores
