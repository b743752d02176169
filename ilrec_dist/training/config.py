"""The configuration section `train`: methods, seeds, schedule and checkpoints."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal, Optional

from annotated_types import Ge, Interval, MinLen
from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    Float,
    Int,
    NonNegative,
    NonNegativeFloat,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)
from ilrec_dist.model.config import PRETRAINED, LoraConfig, Trainable
from ilrec_dist.objective.registry import DEFAULT_METHODS, METHODS, known_names
from ilrec_dist.reporting.trackers import TrackerName


def _registered(name: str) -> str:
    if name not in METHODS:
        raise PydanticCustomError("unknown_method", f"input should be {known_names()}")
    return name


def _steps_or_share(value: Any) -> int | float:
    if isinstance(value, str):
        # YAML reads 3e-2, without a point, as text.
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise PydanticCustomError(
        "steps_or_share",
        "input should be a number of steps (an integer from 0 on) or a share of the steps "
        "(a number between 0 and 1)",
    )


def _has_adapters(config: Any) -> bool:
    return bool(config.train.trainable.startswith("lora"))


def _has_old_and_new_weights(config: Any) -> bool:
    return config.backbone.from_ is not None and config.train.trainable in ("full", "lora+new_rows")


MethodName = Annotated[str, AfterValidator(_registered)]
StepsOrShare = Annotated[int | float, BeforeValidator(_steps_or_share)]


@section(affects="train")
class TrainConfig:
    methods: Annotated[list[MethodName], MinLen(1), Affects()] = field(
        default_factory=lambda: list(DEFAULT_METHODS)
    )
    seeds: Annotated[list[NonNegative], MinLen(1), Affects()] = field(default_factory=lambda: [0])
    # What of a pretrained model is trained; the rest of its weights stays as it is.
    trainable: Annotated[Trainable, PRETRAINED] = "full"
    lora: Annotated[LoraConfig, OnlyIf("train.trainable lora or lora+new_rows", _has_adapters)] = (
        field(default_factory=LoraConfig)
    )
    targets: Literal["all", "last"] = "all"
    # Items of context.
    max_history: Positive = 20
    # Users whose items the language model is trained to give, a fixed seeded sample; 0: all.
    users: NonNegative = 0
    epochs: Positive = 10
    # Sequences per optimizer step, over all ranks and accumulation steps.
    batch_size: Positive = 256
    accumulation_steps: Annotated[
        Positive,
        OnlyIf(
            "train.micro_batch_tokens null, which decides it otherwise",
            lambda config: config.train.micro_batch_tokens is None,
        ),
    ] = 1
    # Tokens of a micro-batch, at most, unless one sequence alone has more; each step then has as
    # many micro-batches as its sequences take. None: accumulation_steps of them.
    micro_batch_tokens: Annotated[Optional[Positive], Affects()] = None
    learning_rate: PositiveFloat = 2e-3
    # Of the rows of item tokens that were added to a pretrained model; None: learning_rate.
    new_rows_learning_rate: Annotated[
        Optional[PositiveFloat],
        OnlyIf(
            "a model in backbone.from and train.trainable full or lora+new_rows",
            _has_old_and_new_weights,
        ),
    ] = None
    # Where the cosine ends, relative to the rates.
    min_learning_rate_ratio: Annotated[Float, Interval(ge=0, le=1)] = 0.0
    # The linear warm-up: a number of steps (an integer), or a share of all steps (below 1).
    warmup: StepsOrShare = 0.03
    weight_decay: NonNegativeFloat = 0.05
    adam_beta2: Annotated[Float, Interval(gt=0, lt=1)] = 0.98
    # The largest norm of the gradient; 0: no clipping.
    clip_norm: NonNegativeFloat = 1.0
    # Steps in a row whose loss or gradient may be NaN or infinite, and which are left out.
    max_bad_steps: Annotated[NonNegative, Affects()] = 5
    precision: Literal["fp32", "bf16"] = "fp32"
    # Keep only the layers' inputs in memory, and compute the rest of a layer again in backward.
    recompute: Annotated[Bool, Affects()] = False
    # DeepSpeed's ZeRO: 1 cuts the optimizer's state over the data-parallel ranks, 2 the
    # gradients as well, 3 the weights too.
    zero_stage: Annotated[
        Literal[1, 2, 3],
        Affects(),
        OnlyIf(
            "several data-parallel processes (launch.workers above launch.tp)",
            lambda config: config.launch.dp > 1,
        ),
    ] = 1
    # The most steps that a death may cost.
    checkpoint_steps: Annotated[Int, Ge(2), Affects()] = 200
    keep_checkpoints: Annotated[Int, Ge(2), Affects()] = 2
    # Epochs between validations.
    validate_epochs: Positive = 1
    # A fixed seeded sample; 0: all users.
    validation_users: NonNegative = 2000
    # Validations without a better NDCG@10 before stopping; 0: never stop early.
    patience: NonNegative = 0
    # Where the metrics go beside metrics.jsonl and TensorBoard.
    tracker: Annotated[Optional[TrackerName], Affects()] = None

    @property
    def steps_between_checkpoints(self) -> int:
        """There are two checkpoints in `checkpoint_steps`.

        One that is being written when a death comes is
        lost, and the next one waits for it.
        """
        return self.checkpoint_steps // 2
