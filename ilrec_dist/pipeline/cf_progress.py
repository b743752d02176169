"""How far the training of the CF models is, in epochs over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ilrec_dist.cf.config import CFConfig


def cf_epochs(cf: CFConfig) -> int:
    """Epochs of all models together: the full one and, under cross-fitting,
    one a fold.
    """
    return (1 + (cf.cf_folds if cf.cf_folds > 1 else 0)) * cf.epochs


def epochs_so_far(show: Callable[[float, str], None]) -> Callable[[dict[str, Any]], None]:
    """What `train_cf` calls after every epoch: shows the epochs so far and the last
    one's loss.
    """
    epochs: dict[str, float] = {}

    def progress(event: dict[str, Any]) -> None:
        epochs[event["model"]] = event["epoch"]
        show(
            sum(epochs.values()),
            f"{event['model']} loss {event['loss']:.3f} NDCG@10 {event['ndcg@10']:.4f}",
        )

    return progress
