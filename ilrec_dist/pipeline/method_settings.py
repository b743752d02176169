"""The section `train` as a method follows it."""

from __future__ import annotations

import dataclasses

from ilrec_dist.config.tree import Config
from ilrec_dist.objective.registry import Method
from ilrec_dist.training.config import TrainConfig

# The learning rate of a preference training that names none, relative to train.learning_rate.
LEARNING_RATE_SHARE = 0.1


def training_settings(config: Config, method: Method) -> TrainConfig:
    """The section `train` as the method follows
    it: its own epochs and learning rate.
    """
    if method.samples == "targets":
        return config.train
    preference, train = method.preference(config.preference), config.train
    rate, of_rows = preference.learning_rate or LEARNING_RATE_SHARE * train.learning_rate, None
    if train.new_rows_learning_rate is not None:
        of_rows = train.new_rows_learning_rate * rate / train.learning_rate
    return dataclasses.replace(
        train,
        epochs=preference.epochs or train.epochs,
        learning_rate=rate,
        new_rows_learning_rate=of_rows,
    )
