"""Ragged shapes: row counts and vocabularies off every block size.

By hypothesis, and at the sizes people use.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ilrec_kernels.steps.topk import dense_candidates

from ilrec_dist.testing.distributed import run_distributed
from tests.support.loss_cases import (
    Case,
    Outcome,
    assert_close,
    make_case,
    reference_by_rows,
    run_case,
)
from tests.support.loss_shards import sharded, whole

scopes = st.sampled_from(["valid_next", "item_tokens", "all"])


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 60),
    v=st.integers(1, 400),
    d=st.integers(1, 24),
    m=st.integers(1, 3),
    k=st.integers(1, 128),
    seed=st.integers(0, 99),
    std=st.sampled_from([0.3, 2.0, 8.0]),
    threshold=st.sampled_from([1e-4, 0.5, 1.0, 3.0]),
    negatives=scopes,
    distill=scopes,
    softmax=st.sampled_from(["all", "valid_next"]),
    workspace=st.integers(10_000, 400_000),
)
def test_any_shape(n, v, d, m, k, seed, std, threshold, negatives, distill, softmax, workspace):
    """In fp64, where no shape makes rounding large beside a loss that is nearly 0."""
    case = make_case(
        n=n,
        d=d,
        v=v,
        m=m,
        seed=seed,
        std=std,
        dtype=torch.float64,
        max_negatives=k,
        negative_threshold=threshold,
        negative_scope=negatives,
        distill_scope=distill,
        softmax_scope=softmax,
        workspace_bytes=workspace,
        item_tokens=(min(1, v - 1), v),
        mu=0.5,
        crr_lambda=0.3,
    )
    assert_close(run_case(case, "torch"), run_case(case, "reference"), 1e-8, floor=1e-2)


@pytest.mark.parametrize("budget", [1, 200_000, 1 << 24])
def test_dense_candidates_are_those_of_a_stable_sort(budget):
    """Rows without, with few and with many blocks that reach the threshold, at once.

    Values tie across blocks and across the cut.
    """
    g = torch.Generator().manual_seed(0)
    values, k = (3 * torch.randn(40, 1000, generator=g)).round(), 3
    threshold = torch.linspace(-2, 12, 40)[torch.randperm(40, generator=g)]
    blocks = (values.unfold(1, 32, 32).amax(2) >= threshold[:, None]).sum(1)
    assert (
        (blocks == 0).any() and ((blocks > 0) & (blocks <= 2 * k)).any() and (blocks > 2 * k).any()
    )
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True) & (
        values >= threshold[:, None]
    )
    row, column, value = dense_candidates(values, threshold, k, budget)
    assert torch.equal(torch.stack([row, column]), torch.stack(expected.nonzero(as_tuple=True)))
    assert torch.equal(value, values[row, column])


ROWS, VOCABULARIES = (0, 1, 26, 128, 513), (507, 50_264, 128_256)
# Logits of a case; the larger vocabularies are tested with fewer rows.
LARGEST_CASE = 7_000_000


@cache
def sized(v: int) -> tuple[list[Case], list[Outcome]]:
    """Return a case of each number of rows, and the truth.

    In sixteenths all logits are exact in fp32: no candidate is within rounding of the
    threshold.
    """
    settings: dict[str, Any] = dict(
        negative_scope="all",
        distill_scope="item_tokens",
        item_tokens=(v - 300, v),
        crr_lambda=0.3,
        workspace_bytes=4 << 20,
    )
    cases = [
        make_case(n=n, d=8, v=v, m=1, seed=n, **settings) for n in ROWS if n * v < LARGEST_CASE
    ]
    cases = [
        replace(
            c, hidden=[(16 * h).round() / 16 for h in c.hidden], head=(16 * c.head).round() / 16
        )
        for c in cases
    ]
    return cases, [reference_by_rows(case, loss_scale=0.1) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_usual_sizes(v, tp):
    """Every rank holds as many rows of the head, a multiple of 128.

    The last ones are padding, or nothing but padding.
    """
    cases, truths = sized(v)
    width = (v // tp // 128 + 1) * 128
    ranks = run_distributed(sharded, tp, tp, cases, [i * width for i in range(tp + 1)], "torch")
    for i, (case, truth) in enumerate(zip(cases, truths, strict=True)):
        assert_close(whole([r[i] for r in ranks], case), truth, 1e-5, floor=1e-2)
