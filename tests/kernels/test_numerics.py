"""Rounding: what bf16 inputs cost in loss and gradients, with a variant
that must fail.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss
from ilrec_kernels.layout import gemm
from ilrec_kernels.reference import constants, dense_rewards, row_losses, scopes
from torch import Tensor

from tests.support.loss_cases import Case, distance, make_case, run_case


@pytest.fixture(params=[False, True], ids=["fp32 products", "bf16 products"])
def bf16_products(request, monkeypatch) -> bool:
    """Whether the gradients' products are in bf16, as on a CPU that has such products.

    Any CPU computes them; those without only lose time.
    """
    monkeypatch.setattr(gemm, "cpu_multiplies_bf16", lambda: request.param)
    return request.param


def bf16_case(std: float, **options) -> Case:
    """Layers that have nearly settled, as the last ones have.

    The difference p^l − p^L is small against either.
    """
    case = make_case(
        n=48,
        d=64,
        v=500,
        std=std,
        dtype=torch.bfloat16,
        distill_scope="all",
        negative_scope="all",
        **options,
    )
    g = torch.Generator().manual_seed(1)
    near = [
        (
            case.hidden[0] + 0.1 / std**0.5 * torch.randn(case.hidden[0].shape, generator=g)
        ).bfloat16()
        for _ in case.hidden[1:]
    ]
    return replace(case, hidden=[case.hidden[0], *near])


def rounded_gradients(case: Case) -> list[Tensor]:
    """The distillation gradient at the hidden rows, from logits rounded to bf16."""
    m = len(case.hidden) - 1
    p = [(h @ case.head.T).float().softmax(1) for h in case.hidden]
    return [case.options.mu / m * (student - p[0]) @ case.head.float() for student in p[1:]]


@pytest.mark.parametrize("std", [1.0, 5.0, 10.0, 30.0])
def test_distillation_gradient_with_bf16_inputs(std, bf16_products):
    case = bf16_case(std, beta=0.0, crr_lambda=0.0, mu=1.0)
    ours, truth = run_case(case, "torch"), run_case(case, "reference")
    fine = replace(case, hidden=[h.double() for h in case.hidden], head=case.head.double())
    exact = run_case(fine, "reference")
    # The KL is 0.01 a row, out of logits of up to 100 in fp32.
    assert distance(ours.output.cpd, exact.output.cpd) < 1e-3
    for layer in range(1, len(case.hidden)):
        assert distance(ours.hidden[layer], exact.hidden[layer]) <= 5e-3
        assert distance(truth.hidden[layer], exact.hidden[layer]) <= 5e-3
    assert (
        min(distance(r, e) for r, e in zip(rounded_gradients(case), exact.hidden[1:], strict=True))
        > 2e-2
    )


def torch_in_bf16(case: Case) -> tuple[Tensor, list[Tensor | None]]:
    """The same loss materialised, with bf16 products and logits as under autocast.

    Returns (loss, gradients of the hidden rows and the head).
    """
    o, leaves = case.options, [t.clone().requires_grad_() for t in (*case.hidden, case.head)]
    z = [(h @ leaves[-1].T).float() for h in leaves[:-1]]
    scope = scopes(case.targets, case.lists, o)
    fixed = constants(
        z, scope, dense_rewards(len(case.targets), case.lists, case.rewards, o, torch.float32), o
    )
    cpo, kl, crr = row_losses(z, scope, fixed, o)
    loss = (cpo + o.crr_lambda * crr + (o.mu * kl.mean(0) if o.mu > 0 else 0.0)).sum()
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "terms",
    [
        dict(beta=0.0, mu=0.0, crr_lambda=0.0),
        dict(mu=0.5, crr_lambda=0.3),
        dict(mu=0.5, crr_lambda=0.3, softmax_scope="valid_next"),
    ],
)
@pytest.mark.parametrize("std", [1.0, 5.0, 10.0, 30.0])
def test_losses_and_gradients_against_torch_in_bf16(std, terms, bf16_products):
    """At most 3× torch's own error for the loss, 2× for gradients.

    Both are measured against fp64 of the same bf16 inputs.
    """
    case = bf16_case(std, **terms)
    exact = run_case(
        replace(case, hidden=[h.double() for h in case.hidden], head=case.head.double()),
        "reference",
    )
    ours, (loss, gradients) = run_case(case, "torch"), torch_in_bf16(case)
    truth = exact.output.loss.detach()
    assert distance(ours.output.loss.detach(), truth) <= 3 * distance(loss, truth) + 1e-5
    for mine, theirs, true in zip(
        [*ours.hidden, ours.head], gradients, [*exact.hidden, exact.head], strict=True
    ):
        assert distance(mine, true) <= 2 * distance(theirs, true) + 1e-4


def test_the_heads_gradient_accumulates_in_fp32(bf16_products):
    """Many chunks each add little to a row that is large: a bf16 sum would stop
    growing.
    """
    n, d = 2048, 8
    hidden = torch.ones(n, d, dtype=torch.bfloat16)
    head = torch.zeros(64, d, dtype=torch.bfloat16)
    lists = TokenLists(torch.zeros(n + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    options = LossOptions(vocab_size=64, beta=0.0, mu=0.0, crr_lambda=0.0, workspace_bytes=16_384)
    case = Case([hidden], head, torch.zeros(n, dtype=torch.int64), lists, torch.zeros(0), options)
    expected = n * (1 / 64 - torch.nn.functional.one_hot(torch.tensor(0), 64).double())[
        :, None
    ].expand(-1, d)
    assert distance(run_case(case).head, expected) < 4e-3


def test_a_wide_gradient_buffer_keeps_fp32(bf16_products):
    """With grad_dtype float32 a bf16 head's gradient and its sum are fp32."""
    case = make_case(n=20, dtype=torch.bfloat16)
    head = case.head.clone().requires_grad_()
    head.grad_dtype = torch.float32
    fine = run_case(
        replace(case, hidden=[h.double() for h in case.hidden], head=case.head.double())
    )
    for _ in range(3):
        cross_layer_loss(
            case.hidden[0],
            case.hidden[1:],
            head,
            case.targets,
            case.lists,
            case.rewards,
            case.options,
        ).loss.backward()
    assert head.grad is not None and head.grad.dtype == torch.float32
    # Factors in bf16 cost more than the sum's rounding.
    assert distance(head.grad, 3 * fine.head) < (5e-3 if bf16_products else 1e-5)


@pytest.mark.parametrize("settings", [dict(), dict(distill_scope="all", negative_scope="all")])
def test_bf16_products_over_several_blocks_of_a_wide_head(settings, monkeypatch):
    """Half-precision blocks are summed in fp32, for hidden rows, head and workspace
    alike.
    """
    case = make_case(
        n=40, d=64, v=9000, dtype=torch.bfloat16, mu=0.5, crr_lambda=0.3, longest=30, **settings
    )
    truth = run_case(case, "reference")
    monkeypatch.setattr(gemm, "cpu_multiplies_bf16", lambda: True)
    ours = run_case(replace(case, options=replace(case.options, workspace_bytes=2 << 20)))
    for mine, true in zip([*ours.hidden, ours.head], [*truth.hidden, truth.head], strict=True):
        assert distance(mine, true) <= 5e-3
    # A call in fp64 is never rounded.
    fine = replace(case, hidden=[h.double() for h in case.hidden])
    assert distance(run_case(fine).hidden[0], run_case(fine, "reference").hidden[0]) <= 1e-9
