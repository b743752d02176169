"""The configuration section `objective`: the loss of METHOD.md §§2-6."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from annotated_types import Interval

from ilrec_dist.common.config_fields import (
    Affects,
    Int,
    NonNegativeFloat,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)


@section(affects="train")
class ObjectiveConfig:
    """METHOD.md §§2-6."""

    # m, the intermediate layers that are read; None: min(3, L // 2).
    num_intermediate_layers: Optional[Positive] = None
    negatives_from: Literal["intermediate", "final"] = "intermediate"
    # φ of the threshold on p̄(v) relative to p̄(y).
    negative_threshold: PositiveFloat = 1.0
    # k, the largest number of negatives of a row.
    max_negatives: Annotated[Int, Interval(ge=1, le=128)] = 64
    negative_scope: Literal["valid_next", "item_tokens", "all"] = "valid_next"
    penalty: Literal["additive", "multiplicative"] = "additive"
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
    backend: Literal["torch", "reference", "triton"] = "torch"
    # Memory for the loss besides its inputs and gradients; None: 64 on CPU, 1024 on GPU.
    workspace_mib: Annotated[Optional[Positive], Affects()] = None

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
        """Whether β = μ = λ = 0, so that only the cross-entropy remains (METHOD.md §6)."""
        return self.beta == 0 and self.cpd_mu == 0 and self.crr_lambda == 0
