"""The configuration section `objective`: the loss of METHOD.md §§2-6."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from annotated_types import Interval

from ilrec_dist.common.config_fields import (
    Affects,
    Float,
    Int,
    NonNegativeFloat,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)


def _reads_negatives(config: Any) -> bool:
    return bool(config.objective.beta > 0 or config.objective.crr_lambda > 0)


def _reads_layers(config: Any) -> bool:
    objective = config.objective
    from_layers = objective.negatives_from != "final" and _reads_negatives(config)
    return bool(objective.cpd_mu > 0 or from_layers)


_IF_NEGATIVES = OnlyIf("objective.cpo_beta or objective.crr_lambda above 0", _reads_negatives)
_IF_LAYERS = OnlyIf(
    "objective.cpd_mu above 0, or negatives from intermediate layers (objective.negatives_from)",
    _reads_layers,
)


@section(affects="train")
class ObjectiveConfig:
    """METHOD.md §§2-6."""

    # m, the intermediate layers that are read; None: min(3, L // 2).
    num_intermediate_layers: Annotated[Optional[Positive], _IF_LAYERS] = None
    # `random` is the ablation that draws as many as the intermediate layers find.
    negatives_from: Annotated[Literal["intermediate", "final", "random"], _IF_NEGATIVES] = (
        "intermediate"
    )
    # φ of the threshold on p̄(v) relative to p̄(y).
    negative_threshold: Annotated[PositiveFloat, _IF_NEGATIVES] = 1.0
    # k, the largest number of negatives of a row.
    max_negatives: Annotated[Int, Interval(ge=1, le=128), _IF_NEGATIVES] = 64
    negative_scope: Annotated[Literal["valid_next", "item_tokens", "all"], _IF_NEGATIVES] = (
        "valid_next"
    )
    penalty: Annotated[
        Literal["additive", "multiplicative"],
        OnlyIf("objective.cpo_beta above 0", lambda config: config.objective.beta > 0),
    ] = "additive"
    # β; None: 1 with the additive penalty, 0.1 with the multiplicative one.
    cpo_beta: Optional[NonNegativeFloat] = None
    softmax_scope: Literal["all", "valid_next"] = "all"
    # μ, the weight of CPD.
    cpd_mu: NonNegativeFloat = 0.1
    distill_scope: Annotated[
        Literal["item_tokens", "valid_next", "all"],
        OnlyIf("objective.cpd_mu above 0", lambda config: config.objective.cpd_mu > 0),
    ] = "item_tokens"
    # λ, the weight of CRR.
    crr_lambda: NonNegativeFloat = 0.02
    # ε of the soft label.
    reward_floor: Annotated[
        PositiveFloat,
        OnlyIf("objective.crr_lambda above 0", lambda config: config.objective.crr_lambda > 0),
    ] = 1e-4
    # β, μ and λ rise from 0 over this share of the optimizer steps.
    ramp: Annotated[
        Float,
        Interval(ge=0, le=1),
        OnlyIf(
            "objective.cpo_beta, objective.cpd_mu or objective.crr_lambda above 0",
            lambda config: not config.objective.is_cross_entropy,
        ),
    ] = 0.0
    backend: Literal["torch", "reference", "triton"] = "torch"
    # Memory for the loss besides its inputs and gradients; None: 64 on CPU, 1024 on GPU.
    workspace_mib: Annotated[
        Optional[Positive],
        Affects(),
        OnlyIf(
            "objective.backend torch or triton",
            lambda config: config.objective.backend != "reference",
        ),
    ] = None

    @property
    def beta(self) -> float:
        if self.cpo_beta is not None:
            return self.cpo_beta
        return 1.0 if self.penalty == "additive" else 0.1

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each loss term in the total (METHOD.md §6)."""
        return {"cpo": 1.0, "cpd": self.cpd_mu, "crr": self.crr_lambda}

    @property
    def is_cross_entropy(self) -> bool:
        """Whether β = μ = λ = 0, so that only
        the cross-entropy remains (METHOD.md §6).
        """
        return self.beta == 0 and self.cpd_mu == 0 and self.crr_lambda == 0


def num_intermediate_layers(config: ObjectiveConfig, num_layers: int) -> int:
    """m: the configured number, or min(3, L //
    2); 0 where the loss is plain cross-entropy.
    """
    if config.is_cross_entropy:
        return 0
    return config.num_intermediate_layers or min(3, num_layers // 2)


def num_streams(config: ObjectiveConfig, num_layers: int) -> int:
    """Streams of hidden rows that the loss makes logits of:
    the final layer's, and those of m intermediate layers.
    """
    needs_negatives = config.beta > 0 or config.crr_lambda > 0
    from_layers = needs_negatives and config.negatives_from == "intermediate"
    takes_part = config.cpd_mu > 0 or from_layers
    return 1 + (num_intermediate_layers(config, num_layers) if takes_part else 0)


@section(affects="train")
class PreferenceConfig:
    """Preference methods (METHOD.md §11)."""

    # β, how steep the preference is; None: the method's own default.
    beta: Optional[PositiveFloat] = None
    # γ, the margin by which the target's mean log p is to lead.
    gamma: NonNegativeFloat = 1.0
    # Negatives of a target, where the method takes several.
    negatives: Annotated[Int, Interval(ge=1, le=64)] = 3
    # Rounds of self-play, where the method plays against itself.
    rounds: Positive = 2
    # None: train.epochs.
    epochs: Optional[Positive] = None
    # None: a tenth of train.learning_rate.
    learning_rate: Optional[PositiveFloat] = None
