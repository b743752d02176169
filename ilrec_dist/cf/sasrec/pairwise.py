"""How likely the collaborative model finds
one item better than another (METHOD.md §11).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ilrec_dist.cf.sasrec.checkpoint import load_cf, load_folds, read_manifest
from ilrec_dist.cf.sasrec.model import SASRec, encode
from ilrec_dist.data.dataset import InteractionDataset


class PairwiseProbabilities:
    """P(first is better than second | history), each user by the model of their fold.

    That model saw none of the user's sequence. P is P_CF(first) ÷ (P_CF(first)
    + P_CF(second)), and 0 where the model does not know the two of them.
    """

    def __init__(
        self, models: list[SASRec], folds: np.ndarray, dataset: InteractionDataset
    ) -> None:
        """models: one of each fold, whole; folds int64 [U]: the fold of each user."""
        self.models, self.folds, self.dataset = models, folds, dataset

    @staticmethod
    def open(cf_folder: str | Path, dataset: InteractionDataset) -> PairwiseProbabilities:
        """Of a run's folder `cf`, whose models were trained on `dataset`.

        Raises UserError when a file is missing or damaged.
        """
        count = read_manifest(cf_folder)["config"]["cf_folds"]
        models = [load_cf(cf_folder, f"fold{fold}") for fold in range(count)]
        return PairwiseProbabilities(models, load_folds(cf_folder), dataset)

    @torch.no_grad()
    def __call__(
        self, users: np.ndarray, positions: np.ndarray, first: np.ndarray, second: np.ndarray
    ) -> np.ndarray:
        """float32 [T]: items first and second int64
        [T] after the histories before positions.
        """
        result = np.zeros(len(users), np.float32)
        starts = self.dataset.offsets[users]
        for fold in np.unique(self.folds[users]):
            rows, model = np.flatnonzero(self.folds[users] == fold), self.models[fold]
            queries = encode(model, self.dataset.items, starts[rows], positions[rows])
            items = [torch.from_numpy(side[rows]).to(model.device) for side in (first, second)]
            logits = [(queries * model.items(side)).sum(-1) for side in items]
            known = model.known[items[0]] & model.known[items[1]]
            better = torch.sigmoid(logits[0] - logits[1]) * known
            result[rows] = better.float().cpu().numpy()
        return result
