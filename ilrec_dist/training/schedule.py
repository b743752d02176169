"""The learning rate of every optimizer step."""

from __future__ import annotations

import math

from ilrec_dist.training.config import TrainConfig

# A warm-up beyond this share of the steps is warned about: the peak is reached too late, or never.
LONG_WARMUP = 1 / 3


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    """Steps of the linear warm-up: train.warmup itself, or that share of the steps.

    A share above 0 gives at least one step, and no warm-up is longer than the training.
    """
    if isinstance(config.warmup, int):
        return min(config.warmup, total_steps)
    return min(max(1, round(config.warmup * total_steps)), total_steps)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, from 0.

    A linear warm-up to the peak, then a cosine to min_learning_rate_ratio of it.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    end = config.min_learning_rate_ratio
    return config.learning_rate * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_warning(config: TrainConfig, total_steps: int) -> str | None:
    """One line where the warm-up takes more than a third of the steps,
    otherwise None.
    """
    if isinstance(config.warmup, int):
        if config.warmup <= LONG_WARMUP * total_steps:
            return None
        reached = (
            "is reached late" if config.warmup < total_steps else "is reached at the last step only"
        )
        return (
            f"train.warmup: {config.warmup} of the {total_steps} steps are warm-up, so the peak "
            f"learning rate {reached}; give a share of the steps, such as train.warmup=0.03"
        )
    if config.warmup <= LONG_WARMUP:
        return None
    return (
        f"train.warmup: {config.warmup:.0%} of the steps are warm-up, so the peak learning rate "
        "is reached late; most trainings need a share of 0.1 or less"
    )
