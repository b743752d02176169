"""The configuration section `objective`: the loss of METHOD.md §§2-6."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from annotated_types import Interval

from ilrec_dist.common.config_fields import Int, NonNegativeFloat, Positive, PositiveFloat, section


@section
class ObjectiveConfig:
    """METHOD.md §§2–6. `cpo_beta: null` takes the penalty's default (additive 1, multiplicative 0.1)."""

    num_intermediate_layers: Optional[Positive] = None  # m; None: min(3, L // 2)
    negatives_from: Literal["intermediate", "final"] = "intermediate"
    negative_threshold: PositiveFloat = 1.0  # φ
    max_negatives: Annotated[Int, Interval(ge=1, le=128)] = 64  # k
    negative_scope: Literal["valid_next", "item_tokens", "all"] = "valid_next"
    penalty: Literal["additive", "multiplicative"] = "additive"
    cpo_beta: Optional[NonNegativeFloat] = None  # β
    softmax_scope: Literal["all", "valid_next"] = "all"
    cpd_mu: NonNegativeFloat = 0.1  # μ
    distill_scope: Literal["item_tokens", "valid_next", "all"] = "item_tokens"
    crr_lambda: NonNegativeFloat = 0.02  # λ
    reward_floor: PositiveFloat = 1e-4  # ε
    backend: Literal["torch", "reference", "triton"] = "torch"
    workspace_mib: Optional[Positive] = None  # None: 64 on CPU, 1024 on GPU

    @property
    def beta(self) -> float:
        if self.cpo_beta is not None:
            return self.cpo_beta
        return 1.0 if self.penalty == "additive" else 0.1

    @property
    def is_cross_entropy(self) -> bool:
        """Whether β = μ = λ = 0, so that only the cross-entropy remains (METHOD.md §6)."""
        return self.beta == 0 and self.cpd_mu == 0 and self.crr_lambda == 0
