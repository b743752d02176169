"""What the objective gives for a micro-batch
of prompts, whose rows are items and words.
"""

from __future__ import annotations

from dataclasses import dataclass

from ilrec_kernels import RowStats
from torch import Tensor


@dataclass(frozen=True)
class GroupedRowStats:
    """What happened in the rows of prompts: item tokens, and words."""

    # Item tokens that may have rewards.
    rewarded: RowStats
    # Item tokens of alignment tasks, which have none; None where there are none of them.
    unrewarded: RowStats | None
    # Cross-entropies of words, [n].
    words: Tensor


@dataclass(frozen=True)
class GroupedOutput:
    """The loss of a micro-batch of prompts, differentiable, and its rows."""

    loss: Tensor
    rows: GroupedRowStats
