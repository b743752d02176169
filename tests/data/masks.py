"""Training or not, and whose: of every interaction, the plain way."""

from __future__ import annotations

import numpy as np

from ilrec_dist.data.prepared import Prepared


def train_mask(prepared: Prepared) -> np.ndarray:
    """bool [T] interactions of the training split."""
    return np.concatenate([np.arange(length) < train for length, train in zip(prepared.lengths(), prepared.train_lengths(), strict=True)])


def user_of_interaction(prepared: Prepared) -> np.ndarray:
    """int64 [T] the user of every interaction."""
    return np.repeat(np.arange(prepared.num_users), prepared.lengths())
