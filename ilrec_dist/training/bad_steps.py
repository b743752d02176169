"""Steps whose loss is NaN or infinite on some rank: all ranks leave them out together.

DeepSpeed leaves a step out where the norm of the gradients, which it sums
over all ranks, is not finite. So a bad loss only has to reach the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def poisoned(loss: Tensor) -> Tensor:
    """The loss, or one whose gradients are all NaN where it is not finite itself."""
    return loss if math.isfinite(float(loss.detach())) else loss * math.nan


def term_in_words(rows: Sequence[Any]) -> str:
    """Which loss term of which rank is not
    finite, the same on every rank; a collective.

    rows: the statistics of this rank's micro-batches.
    """
    terms: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(terms, _bad_term(rows))
    for rank, term in enumerate(terms):
        if term is not None:
            return f"rank {rank}: the loss term {term}"
    return "the gradient is not finite"


def _bad_term(rows: Sequence[Any]) -> str | None:
    for part in rows:
        for name, values in getattr(part, "terms", {}).items():
            bad = values[~values.isfinite()]
            if len(bad):
                return f"{name} is {float(bad[0])}"
    return None
