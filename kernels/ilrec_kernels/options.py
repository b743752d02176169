"""The operator's vocabulary: its options, its sparse inputs, what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor


class Backend(StrEnum):
    """Which implementation computes the loss."""

    # Plain torch autograd over rows × vocabulary, upcast to fp64 first: the truth that
    # the others are tested against.
    REFERENCE = "reference"
    # Chunks of rows on any device, gradients made in forward.
    TORCH = "torch"
    # The same on CUDA devices, with the passes over the logits fused.
    TRITON = "triton"


@dataclass(frozen=True)
class TokenLists:
    """One list of global token ids per row, in CSR form.

    Row i has tokens[indptr[i]:indptr[i + 1]], ascending and distinct. `indptr` is int64
    [N + 1], `tokens` int64 [nnz]. For `valid_next` these are the trie children of the
    target's prefix (METHOD.md §2).
    """

    indptr: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class LossOptions:
    """The settings of METHOD.md §§2–6, and how the loss is computed.

    vocab_size          true size V: columns at or beyond it are padding
    item_tokens         tokens that occur in some item's sequence: a half-open range, an
                        ascending int64 tensor of distinct ids, or None for all tokens
    negative_threshold  φ > 0
    max_negatives       k, 1 to 128
    negatives_from      what makes H: the intermediate layers' ensemble, the final
                        layer, or, of as many as the ensemble finds, a random choice
                        among the valid_next candidates (torch and reference, one rank)
    penalty, beta       how negatives are made harder (§3), and β
    mu                  μ, the weight of the distillation (§4)
    crr_lambda          λ, the weight of the soft label (§5)
    reward_floor        ε > 0
    workspace_bytes     bound on what the backends other than `reference` hold besides
                        inputs and gradients; None is 64 MiB on CPU, 1 GiB on GPU

    Raises ValueError, naming the option, for a value out of range.
    """

    vocab_size: int
    item_tokens: tuple[int, int] | Tensor | None = None
    negative_threshold: float = 1.0
    max_negatives: int = 64
    negative_scope: Literal["valid_next", "item_tokens", "all"] = "valid_next"
    negatives_from: Literal["intermediate", "final", "random"] = "intermediate"
    penalty: Literal["additive", "multiplicative"] = "additive"
    beta: float = 1.0
    softmax_scope: Literal["all", "valid_next"] = "all"
    mu: float = 0.1
    distill_scope: Literal["item_tokens", "valid_next", "all"] = "item_tokens"
    crr_lambda: float = 0.02
    reward_floor: float = 1e-4
    backend: Backend | str = Backend.TORCH
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "negative_scope": ("valid_next", "item_tokens", "all"),
            "negatives_from": ("intermediate", "final", "random"),
            "penalty": ("additive", "multiplicative"),
            "softmax_scope": ("all", "valid_next"),
            "distill_scope": ("item_tokens", "valid_next", "all"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}"
                )
        object.__setattr__(self, "backend", Backend(self.backend))
        if self.negatives_from == "random":
            self._check_random()
        if not 1 <= self.max_negatives <= 128:
            raise ValueError(f"max_negatives: expected 1 to 128, got {self.max_negatives}")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size: expected a positive number, got {self.vocab_size}")
        for name in ("negative_threshold", "reward_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("beta", "mu", "crr_lambda"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name}: expected a number that is not negative, got {getattr(self, name)}"
                )

    def _check_random(self) -> None:
        if self.negative_scope != "valid_next":
            raise ValueError(
                "negatives_from: random chooses among valid_next candidates, got negative_scope "
                f"{self.negative_scope!r}"
            )
        if self.backend is Backend.TRITON:
            raise ValueError(
                "negatives_from: random is for the torch and reference backends, got triton"
            )

    @property
    def needs_negatives(self) -> bool:
        return self.beta > 0 or self.crr_lambda > 0

    @property
    def needs_candidates(self) -> bool:
        """Whether the call needs the valid_next lists."""
        return (
            self.softmax_scope == "valid_next"
            or self.crr_lambda > 0
            or (self.mu > 0 and self.distill_scope == "valid_next")
            or (self.needs_negatives and self.negative_scope == "valid_next")
        )


@dataclass(frozen=True)
class RowStats:
    """What happened in each row, detached and unscaled; the same on every tp rank.

    A row's loss is cpo + μ·cpd + λ·crr. Where negatives are not computed (β = λ = 0)
    their counts are 0. Real values are float32 (float64 for float64 inputs).

    cpd                   the mean of kl over layers
    kl                    one row a layer, in the order L−1 … L−m
    num_negatives         |H|
    capped                more than k candidates passed the threshold
    valid_next_negatives  how many of H lead to a real item
    p_target              p^L(y) over the softmax scope
    covered               some v in H has a reward; False where H is empty
    negatives_key         a fingerprint of the set H (0 where it is empty): equal sets
                          have equal keys, on every backend and layout
    """

    cpo: Tensor  # [N]
    cpd: Tensor  # [N]
    crr: Tensor  # [N]
    kl: Tensor  # [m, N]
    num_negatives: Tensor  # [N]
    capped: Tensor  # bool [N]
    valid_next_negatives: Tensor  # [N]
    p_target: Tensor  # [N]
    covered: Tensor  # bool [N]
    negatives_key: Tensor  # int64 [N]

    @property
    def terms(self) -> dict[str, Tensor]:
        """The loss terms, [N] each, by the names
        under which they are weighted and logged.
        """
        return {"cpo": self.cpo, "cpd": self.cpd, "crr": self.crr}

    @staticmethod
    def zeros(n: int, m: int, dtype: torch.dtype, device: torch.device) -> RowStats:
        def real(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        def flags() -> Tensor:
            return torch.zeros(n, dtype=torch.bool, device=device)

        return RowStats(
            cpo=real(n),
            cpd=real(n),
            crr=real(n),
            kl=real(m, n),
            num_negatives=real(n),
            capped=flags(),
            valid_next_negatives=real(n),
            p_target=real(n),
            covered=flags(),
            negatives_key=torch.zeros(n, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class LossOutput:
    """What a call returns: loss = cpo + μ·cpd + λ·crr.

    `loss` is differentiable: a scalar, or [N] for reduction "none".
    cpo, cpd and crr are its detached parts, reduced and scaled alike.
    """

    loss: Tensor
    cpo: Tensor
    cpd: Tensor
    crr: Tensor
    rows: RowStats


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the computation: fp64 for fp64 inputs, otherwise fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
