"""The loss operator on a CUDA device, skipped where there is none.

Both device backends and both regimes are compared with the reference.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from ilrec_kernels import LossOutput, RowStats, TokenLists

from tests.support.loss_cases import Case, Outcome, assert_close, make_case, run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SETTINGS: list[dict[str, Any]] = [
    dict(),
    dict(negative_scope="all", distill_scope="all"),
    dict(negative_scope="item_tokens", item_tokens=torch.arange(3, 900, 7)),
    dict(softmax_scope="valid_next", distill_scope="valid_next"),
    # There are more candidates than a list has room for.
    dict(negative_scope="all", distill_scope="all", negative_threshold=1e-4),
    dict(negative_scope="item_tokens", negatives_from="final"),
    dict(beta=0.0, mu=0.0, crr_lambda=0.0),
]
REGIME_V = dict(n=2000, v=20_000, d=64, longest=40, workspace_bytes=8 << 20)


def on_device(case: Case) -> Case:
    lists = TokenLists(case.lists.indptr.cuda(), case.lists.tokens.cuda())
    return Case(
        [h.cuda() for h in case.hidden],
        case.head.cuda(),
        case.targets.cuda(),
        lists,
        case.rewards.cuda(),
        case.options,
    )


def back(outcome: Outcome) -> Outcome:
    out = outcome.output
    rows = RowStats(**{f.name: getattr(out.rows, f.name).cpu() for f in fields(RowStats)})
    output = LossOutput(out.loss.cpu(), out.cpo.cpu(), out.cpd.cpu(), out.crr.cpu(), rows)
    return Outcome(
        output,
        [None if g is None else g.cpu() for g in outcome.hidden],
        None if outcome.head is None else outcome.head.cpu(),
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_agrees_with_the_reference(settings, backend):
    case = make_case(
        **{
            "n": 200,
            "v": 3000,
            "d": 64,
            "crr_lambda": 0.3,
            "mu": 0.5,
            "workspace_bytes": 2 << 20,
            **settings,
        }
    )
    assert_close(
        back(run_case(on_device(case), backend)), run_case(case, "reference"), 1e-5, floor=1e-2
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distill_scope": "all"},
        {"distill_scope": "all", "negative_scope": "all"},
        {"negative_scope": "item_tokens", "m": 3},
    ],
)
def test_regime_v_agrees_with_the_reference(settings):
    case = make_case(**{"crr_lambda": 0.3, "mu": 0.5, "max_negatives": 5, **REGIME_V, **settings})
    assert_close(
        back(run_case(on_device(case), "triton")), run_case(case, "reference"), 1e-5, floor=1e-2
    )


@pytest.mark.parametrize(
    "shape", [dict(n=200, v=3000, d=64, negative_scope="all", distill_scope="all"), dict(REGIME_V)]
)
def test_half_precision_gradients_are_rounded_once(shape):
    case = make_case(crr_lambda=0.3, mu=0.5, dtype=torch.bfloat16, **shape)
    ours, truth = back(run_case(on_device(case), "triton")), run_case(case, "reference")
    assert_close(replace(ours, hidden=truth.hidden, head=truth.head), truth, 1e-4)
    for a, b in zip([ours.head, *ours.hidden], [truth.head, *truth.hidden], strict=True):
        assert (
            a is not None
            and b is not None
            and (a.double() - b.double()).norm() <= 5e-3 * b.double().norm()
        )


@pytest.mark.parametrize(
    "shape", [dict(n=200, v=3000, d=64, negative_scope="all", distill_scope="all"), dict(REGIME_V)]
)
def test_twenty_runs_are_bitwise_equal(shape):
    case = on_device(make_case(crr_lambda=0.3, mu=0.5, dtype=torch.bfloat16, **shape))
    first = run_case(case, "triton")
    for _ in range(19):
        again = run_case(case, "triton")
        assert torch.equal(again.output.loss, first.output.loss) and torch.equal(
            again.head, first.head
        )
        assert all(torch.equal(a, b) for a, b in zip(again.hidden, first.hidden, strict=True))
