"""Full-catalogue scores of the SASRec trained on all users: the SASRec row of the results (METHOD.md §9)."""

from __future__ import annotations

import numpy as np
import torch

from ilrec_dist.cf.sasrec.model import SASRec, encode
from ilrec_dist.data.dataset import InteractionDataset


@torch.no_grad()
def sasrec_scores(
    model: SASRec, dataset: InteractionDataset, users: np.ndarray, split: str
) -> np.ndarray:
    """Logits of every item as the target of `split` ("validation" or "test"): float32 [len(users), num_items], by item index.

    The history is all that stands before the target. Seen items are not excluded: that
    is the ranking's business. Users are scored all at once; hand over batches of them.
    `model` is that of all training users, as `load_cf` gives it.
    """
    users = np.asarray(users, np.int64)
    starts = dataset.offsets[users]
    queries = encode(model, dataset.items, starts, dataset.history_stop(split, users) - starts)
    return (queries @ model.items.weight.t()).numpy()
