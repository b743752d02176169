"""Inputs for the operator's tests, and comparison of outcomes by norm.

The inputs are random calls with ragged candidate lists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from ilrec_kernels import LossOptions, LossOutput, RowStats, TokenLists, cross_layer_loss
from torch import Tensor


@dataclass(frozen=True)
class Case:
    # The final layer comes first.
    hidden: list[Tensor]
    head: Tensor
    targets: Tensor
    lists: TokenLists
    rewards: Tensor
    options: LossOptions


def make_case(
    n: int = 37,
    d: int = 16,
    v: int = 61,
    m: int = 2,
    seed: int = 0,
    std: float = 2.0,
    dtype: torch.dtype = torch.float32,
    longest: int = 200,
    **options: Any,
) -> Case:
    """Make layers that agree in part, as real ones do, and lists with the target.

    Lists are of 1 … min(v/2, longest) tokens, and some are shared by many rows.
    """
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, d, generator=g, dtype=torch.float64)
    hidden = [
        (common + 0.7 * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype)
        for _ in range(m + 1)
    ]
    head = (torch.randn(v, d, generator=g, dtype=torch.float64) * (std / (1.22 * d**0.5))).to(dtype)
    shared = [
        torch.randperm(v, generator=g)[: max(1, min(v // 2, longest))].sort().values
        for _ in range(2)
    ]
    targets, lists = [], []
    for i in range(n):
        if i % 2:
            tokens = shared[i // 2 % 2]
        else:
            tokens = (
                torch.randperm(v, generator=g)[
                    : 1 + int(torch.randint(0, max(1, min(v // 4, longest)), (1,), generator=g))
                ]
                .sort()
                .values
            )
        lists.append(tokens)
        targets.append(tokens[int(torch.randint(0, len(tokens), (1,), generator=g))])
    lengths = torch.tensor([0] + [len(t) for t in lists])
    nnz = int(lengths.sum())
    rewards = torch.rand(nnz, generator=g) * (torch.rand(nnz, generator=g) < 0.6)
    options.setdefault("item_tokens", (1, max(2, v - 3)))
    return Case(
        hidden,
        head,
        torch.stack(targets) if targets else torch.zeros(0, dtype=torch.int64),
        TokenLists(
            lengths.cumsum(0), torch.cat(lists) if lists else torch.zeros(0, dtype=torch.int64)
        ),
        rewards,
        LossOptions(vocab_size=v, **options),
    )


@dataclass(frozen=True)
class Outcome:
    output: LossOutput
    hidden: list[Tensor | None]
    head: Tensor | None


def run_case(case: Case, backend: str = "torch", upstream: Any = None, **kwargs: Any) -> Outcome:
    """Forward and backward; gradients None where autograd gave none."""
    hidden = [h.clone().requires_grad_() for h in case.hidden]
    head = kwargs.pop("head", case.head).clone().requires_grad_()
    options = replace(case.options, backend=backend)
    output = cross_layer_loss(
        hidden[0], hidden[1:], head, case.targets, case.lists, case.rewards, options, **kwargs
    )
    output.loss.backward(torch.ones_like(output.loss) if upstream is None else upstream)
    return Outcome(output, [h.grad for h in hidden], head.grad)


def split_rows(case: Case, begin: int, end: int) -> Case:
    low, high = int(case.lists.indptr[begin]), int(case.lists.indptr[end])
    lists = TokenLists(case.lists.indptr[begin : end + 1] - low, case.lists.tokens[low:high])
    return Case(
        [h[begin:end] for h in case.hidden],
        case.head,
        case.targets[begin:end],
        lists,
        case.rewards[low:high],
        case.options,
    )


def reference_by_rows(case: Case, elements: int = 4_000_000, **kwargs: Any) -> Outcome:
    """Run the reference on so many rows at a time that their logits are `elements` at
    most.

    Losses and gradients are sums over rows.
    """
    n, step = len(case.targets), max(1, elements // case.options.vocab_size)
    parts = [
        run_case(split_rows(case, i, min(i + step, n)), "reference", **kwargs)
        for i in range(0, max(n, 1), step)
    ]
    if len(parts) == 1:
        return parts[0]
    outputs = [p.output for p in parts]
    rows = RowStats(
        **{
            f.name: torch.cat([getattr(o.rows, f.name) for o in outputs], -1)
            for f in fields(RowStats)
        }
    )
    sums = [sum(getattr(o, name) for o in outputs) for name in ("loss", "cpo", "cpd", "crr")]
    hidden = [
        None if any(g is None for g in grads) else torch.cat(grads)
        for grads in zip(*(p.hidden for p in parts), strict=True)
    ]
    return Outcome(LossOutput(*sums, rows), hidden, sum(p.head for p in parts))  # type: ignore[arg-type, misc]


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """‖a − b‖ / ‖b‖; None is zero."""
    if a is None or b is None:
        other = a if b is None else b
        return 0.0 if other is None or not other.abs().max() > 0 else float("inf")
    if not a.numel():
        return 0.0
    norm = b.double().norm()
    return float((a.double() - b.double()).norm() / norm) if norm > 0 else float(a.double().norm())


def assert_close(a: Outcome, b: Outcome, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """Compare loss, parts, statistics and gradients by relative norm.

    A layer's gradient may vanish by cancellation (p^l = p^L); `floor` then measures it
    against that share of the final layer's as well.
    """
    distances = {"loss": distance(a.output.loss.detach(), b.output.loss.detach())}
    for name in ("cpo", "cpd", "crr"):
        distances[name] = distance(getattr(a.output, name), getattr(b.output, name))
    for name in ("cpo", "cpd", "crr", "kl", "num_negatives", "valid_next_negatives", "p_target"):
        distances[f"rows.{name}"] = distance(
            getattr(a.output.rows, name), getattr(b.output.rows, name)
        )
    for name in ("capped", "covered", "negatives_key"):
        assert torch.equal(getattr(a.output.rows, name), getattr(b.output.rows, name)), name
    for i, (x, y) in enumerate(zip(a.hidden, b.hidden, strict=True)):
        distances[f"hidden[{i}]"] = distance(x, y)
        if floor and x is not None and y is not None and b.hidden[0] is not None:
            distances[f"hidden[{i}]"] = float(
                (x.double() - y.double()).norm()
                / (y.double().norm() + floor * b.hidden[0].double().norm() + 1e-30)
            )
    distances["head"] = distance(a.head, b.head)
    wrong = {k: v for k, v in distances.items() if not v <= tolerance}
    assert not wrong, wrong
