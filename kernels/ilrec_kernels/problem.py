"""One validated call of the operator: its inputs, its terms, and what they cover."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from ilrec_kernels.layout.vocab_columns import NO_COLUMNS, VocabColumns, dense_columns
from ilrec_kernels.options import Backend, LossOptions, TokenLists, compute_dtype


@dataclass(frozen=True)
class Problem:
    """The inputs of a call.

    hidden     final layer first, then L−1 … L−m
    rewards    [nnz], empty where none were given
    start      the shard owns global tokens [start, stop), without padding
    group      None where there is one shard
    trainable  local head rows with a gradient; None stands for all
    """

    hidden: tuple[Tensor, ...]  # each [N, d]
    head: Tensor  # [V_local, d]
    targets: Tensor  # int64 [N], global
    candidates: TokenLists | None
    rewards: Tensor
    options: LossOptions
    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    trainable: VocabColumns | None = None

    @property
    def n(self) -> int:
        return self.targets.numel()

    @property
    def num_layers(self) -> int:
        """The number m of intermediate layers."""
        return len(self.hidden) - 1

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden[0])

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype in which products take hidden rows.

        On a GPU it is their own where it is the head's, otherwise the computation's.
        """
        as_head = all(h.dtype == self.head.dtype for h in self.hidden)
        return self.head.dtype if self.head.is_cuda and as_head else self.dtype


class ScopeKind(Enum):
    # The term is absent.
    NONE = "none"
    # Every row covers the same columns of the head.
    DENSE = "dense"
    # Every row covers its own valid-next list.
    LISTS = "lists"


@dataclass(frozen=True)
class Scope:
    """The tokens of this rank that a term covers; `columns` is empty unless dense."""

    kind: ScopeKind
    columns: VocabColumns = NO_COLUMNS

    @property
    def is_dense(self) -> bool:
        return self.kind is ScopeKind.DENSE

    @property
    def is_lists(self) -> bool:
        return self.kind is ScopeKind.LISTS

    def __len__(self) -> int:
        return len(self.columns)


NO_SCOPE = Scope(ScopeKind.NONE)
LISTS = Scope(ScopeKind.LISTS)


class DenseSource(Enum):
    """What makes the dense logits and passes over them."""

    # Every scope is a list scope.
    NONE = "none"
    # sources/dense_torch.py
    TORCH = "torch"
    # sources/dense_triton.py, regime T
    TRITON = "triton"
    # sources/vocab_slices.py, regime V
    SLICES = "slices"


@dataclass(frozen=True)
class Terms:
    """What a call computes, and over which tokens.

    streams        how many of the hidden tensors take part
    final, layers  the columns for which the final layer's and the intermediate layers'
                   logits are made; the dense scopes lie within them
    needs_entries  the rows' lists are needed, if only for statistics
    """

    streams: int
    softmax: Scope
    distill: Scope
    negatives: Scope
    final: Scope
    layers: Scope
    needs_entries: bool
    source: DenseSource

    @property
    def layer_streams(self) -> int:
        """How many intermediate layers have dense logits."""
        return self.streams - 1 if self.layers.is_dense else 0

    @property
    def one_product(self) -> bool:
        """Whether all streams cover the same
        columns, so that one product makes them.
        """
        return self.layer_streams > 0 and self.final.columns.same(self.layers.columns)

    @property
    def uses_kernels(self) -> bool:
        return self.source in (DenseSource.TRITON, DenseSource.SLICES)

    @property
    def kernel_finds_negatives(self) -> bool:
        """Whether the statistics kernel also collects the dense candidates for H."""
        negatives = self.negatives
        return self.uses_kernels and negatives.is_dense and not negatives.columns.is_scattered

    @property
    def final_is_teacher(self) -> bool:
        """Whether the final layer's exponentials
        serve cross-entropy and distillation.
        """
        same = self.distill.is_dense and self.distill.columns.same(self.final.columns)
        return self.source is DenseSource.TORCH and self.softmax.is_dense and same

    @property
    def row_logits(self) -> int:
        """How many logits a row has, over all streams."""
        return len(self.final) + (self.streams - 1) * len(self.layers)

    @property
    def row_teacher(self) -> int:
        """How many values the teacher's exponentials take where they are kept apart."""
        return 0 if self.uses_kernels or self.final_is_teacher else len(self.distill)


def call_terms(p: Problem) -> Terms:
    """Say which terms a call has, and which of their scopes are dense."""
    o = p.options
    everything, items = (
        dense_columns(scope, o, p.start, p.stop) for scope in ("all", "item_tokens")
    )
    scopes = {
        "all": Scope(ScopeKind.DENSE, everything),
        "item_tokens": Scope(ScopeKind.DENSE, items),
        "valid_next": LISTS,
    }
    from_layers = o.needs_negatives and o.negatives_from != "final"
    streams = len(p.hidden) if o.mu > 0 or from_layers else 1
    softmax = scopes[o.softmax_scope]
    distill = scopes[o.distill_scope] if o.mu > 0 else NO_SCOPE
    negatives = scopes[o.negative_scope] if o.needs_negatives else NO_SCOPE
    layers = _widest([distill, negatives if from_layers else NO_SCOPE], everything)
    final = softmax if softmax.is_dense else _widest([distill, negatives], everything)
    if (
        softmax.is_dense
        and layers.is_dense
        and not layers.columns.is_scattered
        and len(layers) * 8 >= len(everything) * 7
    ):
        # One product for all streams costs less than leaving a few columns out.
        layers = final
    source = DenseSource.NONE
    if final.is_dense or layers.is_dense:
        scattered = distill.columns.is_scattered or layers.columns.is_scattered
        kernels = o.backend is Backend.TRITON and not scattered
        kernels = kernels and (softmax.is_dense or distill.is_dense)
        source = DenseSource.TRITON if kernels else DenseSource.TORCH
    return Terms(
        streams,
        softmax,
        distill,
        negatives,
        final,
        layers,
        # The lists also serve statistics of negatives that are drawn from elsewhere.
        needs_entries=p.candidates is not None and (o.needs_candidates or o.needs_negatives),
        source=source,
    )


def _widest(scopes: list[Scope], everything: VocabColumns) -> Scope:
    """Return the columns that hold all of these scopes' columns.

    There are two kinds of dense scope at most: all tokens, and item tokens.
    """
    dense = [scope for scope in scopes if scope.is_dense]
    if any(scope.columns is everything for scope in dense):
        return Scope(ScopeKind.DENSE, everything)
    return dense[0] if dense else NO_SCOPE
