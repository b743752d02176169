"""The configuration section `train`: methods, seeds, schedule and checkpoints."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Interval, MinLen
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from ilrec_dist.common.config_fields import (
    Float,
    Int,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    section,
)
from ilrec_dist.objective.registry import DEFAULT_METHODS, METHODS, known_names


def _registered(name: str) -> str:
    if name not in METHODS:
        raise PydanticCustomError("unknown_method", f"input should be {known_names()}")
    return name


MethodName = Annotated[str, AfterValidator(_registered)]


@section
class TrainConfig:
    methods: Annotated[list[MethodName], MinLen(1)] = field(
        default_factory=lambda: list(DEFAULT_METHODS)
    )
    seeds: Annotated[list[NonNegative], MinLen(1)] = field(default_factory=lambda: [0])
    targets: Literal["all", "last"] = "all"
    max_history: Positive = 20  # items of context
    epochs: Positive = 10
    batch_size: Positive = (
        256  # sequences per optimizer step, over all ranks and accumulation steps
    )
    accumulation_steps: Positive = 1
    learning_rate: PositiveFloat = 2e-3
    min_learning_rate_ratio: Annotated[Float, Interval(ge=0, le=1)] = 0.0  # where the cosine ends
    warmup_steps: NonNegative = 300
    weight_decay: NonNegativeFloat = 0.05
    adam_beta2: Annotated[Float, Interval(gt=0, lt=1)] = 0.98
    clip_norm: NonNegativeFloat = 1.0  # 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_steps: Positive = 200  # steps between checkpoints
    keep_checkpoints: Annotated[Int, Ge(2)] = 2
    validate_epochs: Positive = 1  # epochs between validations
    validation_users: NonNegative = 2000  # a fixed seeded sample; 0: all users
    patience: NonNegative = (
        0  # validations without a better NDCG@10 before stopping; 0: never stop early
    )
