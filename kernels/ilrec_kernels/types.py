"""The vocabulary of the operator: its options, its sparse inputs, what it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor


class Backend(StrEnum):
    """Which implementation computes the loss."""

    REFERENCE = "reference"  # plain torch autograd over rows × vocabulary, upcast first: the truth the others are tested against
    TORCH = "torch"  # chunked, any device, gradients made in forward
    TRITON = "triton"  # CUDA


@dataclass(frozen=True)
class TokenLists:
    """One list of global token ids per row, in CSR form: row i has tokens[indptr[i]:indptr[i+1]], ascending and distinct.

    `indptr` is int64 [N+1], `tokens` int64 [nnz]. For `valid_next` these are the trie children of the target's prefix (METHOD.md §2).
    """

    indptr: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class LossOptions:
    """METHOD.md §§2–6. `vocab_size` is the true size: columns at or beyond it are padding and never take part.

    `item_tokens` are the tokens that occur in some item's sequence: a half-open range, an ascending int64 tensor of distinct ids, or None for
    the whole vocabulary. `workspace_bytes` bounds what the backends other than `reference` hold besides inputs and gradients; None is
    64 MiB on CPU and 1 GiB on GPU.
    """

    vocab_size: int
    item_tokens: tuple[int, int] | Tensor | None = None
    negative_threshold: float = 1.0  # φ
    max_negatives: int = 64  # k
    negative_scope: Literal["valid_next", "item_tokens", "all"] = "valid_next"
    negatives_from: Literal["intermediate", "final"] = "intermediate"
    penalty: Literal["additive", "multiplicative"] = "additive"
    beta: float = 1.0  # β
    softmax_scope: Literal["all", "valid_next"] = "all"
    mu: float = 0.1  # μ
    distill_scope: Literal["item_tokens", "valid_next", "all"] = "item_tokens"
    crr_lambda: float = 0.02  # λ
    reward_floor: float = 1e-4  # ε
    backend: Backend | str = Backend.TORCH
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "negative_scope": ("valid_next", "item_tokens", "all"),
            "negatives_from": ("intermediate", "final"),
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

    @property
    def needs_negatives(self) -> bool:
        return self.beta > 0 or self.crr_lambda > 0

    @property
    def needs_candidates(self) -> bool:
        """Whether the call needs the valid_next lists."""
        by_scope = self.softmax_scope == "valid_next" or (
            self.mu > 0 and self.distill_scope == "valid_next"
        )
        return (
            by_scope
            or self.crr_lambda > 0
            or (self.needs_negatives and self.negative_scope == "valid_next")
        )

    def with_backend(self, backend: Backend | str) -> LossOptions:
        return replace(self, backend=backend)


@dataclass(frozen=True)
class RowStats:
    """What happened in each row; detached, unscaled, float32 (float64 for float64 inputs) unless said. The same on every tensor-parallel rank.

    A row's loss is cpo + μ·cpd + λ·crr. Where negatives are not computed (β = λ = 0) their counts are 0.
    """

    cpo: Tensor  # [N]
    cpd: Tensor  # [N], the mean of kl over layers
    crr: Tensor  # [N]
    kl: Tensor  # [m, N], one row a layer, in the order L−1 … L−m
    num_negatives: Tensor  # [N] |H|
    capped: Tensor  # [N] bool: more than k candidates passed the threshold
    valid_next_negatives: Tensor  # [N] how many of H lead to a real item
    p_target: Tensor  # [N] p^L(y) over the softmax scope
    covered: Tensor  # [N] bool: some v in H has a reward; False where H is empty
    negatives_key: Tensor  # int64 [N] a fingerprint of the set H (0 where it is empty): equal sets have equal keys, on every backend and layout


@dataclass(frozen=True)
class LossOutput:
    """`loss` is differentiable: a scalar, or [N] for reduction "none". cpo, cpd and crr are its detached parts, reduced and scaled alike:
    loss = cpo + μ·cpd + λ·crr."""

    loss: Tensor
    cpo: Tensor
    cpd: Tensor
    crr: Tensor
    rows: RowStats


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 inputs are computed in fp64, everything else in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
