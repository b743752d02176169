"""The operator against the reference (METHOD.md §8.1, 2, 5).

Every scope and penalty, limits, awkward inputs, reductions, autograd.
"""

from __future__ import annotations

import ast
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ilrec_kernels
import pytest
import torch
import torch.nn.functional as F
from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss
from ilrec_kernels.reference import constants, dense_rewards, row_losses, scopes
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.support.loss_cases import Case, assert_close, distance, make_case, run_case

SCATTERED = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 55, 56])
SCOPES = list(
    itertools.product(
        ["valid_next", "item_tokens", "all"],
        ["all", "valid_next"],
        ["item_tokens", "valid_next", "all"],
    )
)


@pytest.mark.parametrize("negatives,softmax,distill", SCOPES)
def test_scopes_agree_with_the_reference(negatives, softmax, distill):
    combinations = itertools.product(
        ["additive", "multiplicative"], ["intermediate", "final"], [(1, 58), SCATTERED]
    )
    for i, (penalty, source, items) in enumerate(combinations):
        dtype, tolerance = (torch.float32, 1e-5) if i % 3 else (torch.float64, 1e-9)
        case = make_case(
            negative_scope=negatives,
            softmax_scope=softmax,
            distill_scope=distill,
            penalty=penalty,
            negatives_from=source,
            item_tokens=items,
            max_negatives=5,
            beta=1.0 if penalty == "additive" else 0.1,
            mu=0.5,
            crr_lambda=0.3,
            dtype=dtype,
            workspace_bytes=60_000,
        )
        assert_close(run_case(case, "torch"), run_case(case, "reference"), tolerance)


@pytest.mark.parametrize("softmax", ["all", "valid_next"])
@pytest.mark.parametrize("beta,mu,lam", [(0, 0, 0), (1, 0, 0), (0, 0.1, 0), (0, 0, 0.2)])
def test_terms_alone(softmax, beta, mu, lam):
    case = make_case(
        n=50, softmax_scope=softmax, beta=beta, mu=mu, crr_lambda=lam, dtype=torch.float64
    )
    assert_close(run_case(case, "torch"), run_case(case, "reference"), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("softmax", ["all", "valid_next"])
def test_without_terms_it_is_cross_entropy(backend, softmax):
    case = make_case(softmax_scope=softmax, beta=0.0, mu=0.0, crr_lambda=0.0)
    ours = run_case(case, backend)
    hidden, head = case.hidden[0].double().requires_grad_(), case.head.double().requires_grad_()
    logits = hidden @ head.T
    if softmax == "valid_next":
        rows = torch.repeat_interleave(torch.arange(len(case.targets)), case.lists.indptr.diff())
        mask = torch.zeros_like(logits, dtype=torch.bool).index_put_(
            (rows, case.lists.tokens), torch.tensor(True)
        )
        logits = logits.masked_fill(~mask, -torch.inf)
    loss = F.cross_entropy(logits, case.targets, reduction="sum")
    loss.backward()
    assert distance(ours.output.loss.detach(), loss.detach()) < 1e-6
    assert distance(ours.hidden[0], hidden.grad) < 1e-5
    assert distance(ours.head, head.grad) < 1e-5
    assert all(g is None or not g.any() for g in ours.hidden[1:])


def test_empty_negatives_everywhere_is_cross_entropy_plus_distillation():
    full = make_case(negative_threshold=1e9, dtype=torch.float64)
    plain = replace(full, options=replace(full.options, beta=0.0, crr_lambda=0.0))
    ours, expected = run_case(full), run_case(plain)
    assert not ours.output.rows.num_negatives.any()
    assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize("penalty", ["additive", "multiplicative"])
@pytest.mark.parametrize("softmax", ["all", "valid_next"])
def test_gradcheck_with_the_stop_gradients_held_fixed(penalty, softmax):
    case = make_case(
        n=5,
        d=4,
        v=11,
        penalty=penalty,
        softmax_scope=softmax,
        mu=0.7,
        crr_lambda=0.5,
        max_negatives=2,
        dtype=torch.float64,
        item_tokens=(1, 9),
    )
    o = case.options
    scope = scopes(case.targets, case.lists, o)
    rewards = dense_rewards(5, case.lists, case.rewards, o, torch.float64)
    fixed = constants([h @ case.head.T for h in case.hidden], scope, rewards, o)
    assert fixed.negatives.any()

    def loss(head, *hidden):
        cpo, kl, crr = row_losses([h @ head.T for h in hidden], scope, fixed, o)
        return cpo + o.mu * kl.mean(0) + o.crr_lambda * crr

    inputs = [t.clone().requires_grad_() for t in (case.head, *case.hidden)]
    assert torch.autograd.gradcheck(loss, inputs)
    gradients = torch.autograd.grad(loss(*inputs).sum(), inputs)
    ours = run_case(case, "torch")
    for mine, truth in zip([ours.head, *ours.hidden], gradients, strict=True):
        assert distance(mine, truth) < 1e-10


def awkward() -> dict[str, Case]:
    base = make_case(n=24, v=90, max_negatives=4, crr_lambda=0.3)
    o, zero = base.options, torch.zeros_like(base.hidden[0])
    peaked = replace(base, head=base.head * 15)
    negative = replace(
        base,
        hidden=[h.abs() + 0.1 for h in base.hidden],
        head=-base.head.abs() * 3,
        options=replace(o, penalty="multiplicative"),
    )
    tied = replace(base, hidden=[zero, zero, zero])
    # Every token has an equal neighbour.
    twins = replace(base, head=base.head.repeat_interleave(2, 0)[:90])
    dense = replace(o, negative_scope="item_tokens")
    few = base.lists.tokens.clone()
    # The lists lack some of the targets.
    outside = TokenLists(base.lists.indptr, few)
    targets = base.targets.clone()
    for i in range(0, 24, 3):
        row = few[base.lists.indptr[i] : base.lists.indptr[i + 1]]
        targets[i] = next(t for t in range(90) if t not in row)
    no_lists = TokenLists(torch.zeros(25, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    cases = {
        "peaked": peaked,
        "all logits negative": negative,
        "tied": tied,
        "tied dense": replace(tied, options=dense),
        "twins dense": replace(twins, options=dense),
        "more than k": replace(base, options=replace(o, negative_threshold=1e-6, max_negatives=2)),
        "y not a candidate": replace(base, targets=targets, lists=outside),
        "y not an item": replace(
            base,
            targets=torch.full_like(base.targets, 88),
            options=replace(dense, distill_scope="item_tokens"),
        ),
        "no candidates": replace(base, lists=no_lists, rewards=torch.zeros(0)),
        "one row": make_case(n=1),
        "no rows": make_case(n=0),
        "one token": make_case(v=1, item_tokens=(0, 1)),
        "padded head": replace(base, head=torch.cat([base.head, torch.full((7, 16), 50.0)])),
        "k of 128": make_case(
            n=9, v=700, max_negatives=128, negative_scope="all", negative_threshold=1e-4
        ),
        "two passes": make_case(
            n=9, v=3000, max_negatives=5, negative_scope="all", negative_threshold=0.5
        ),
    }
    return cases


@pytest.mark.parametrize("softmax", ["all", "valid_next"])
@pytest.mark.parametrize("name", sorted(awkward()))
def test_awkward_inputs(name, softmax):
    case = awkward()[name]
    case = replace(case, options=replace(case.options, softmax_scope=softmax))
    ours, truth = run_case(case, "torch"), run_case(case, "reference")
    assert all(
        torch.isfinite(t).all()
        for t in (ours.output.loss, *(g for g in (ours.head, *ours.hidden) if g is not None))
    )
    assert_close(ours, truth, 1e-5, floor=1e-2)


@pytest.mark.parametrize(
    "penalty,beta,offset",
    [
        ("additive", 1.0, 0),
        ("additive", 60.0, 0),
        ("multiplicative", 0.1, 0),
        ("multiplicative", 60.0, -30.0),
    ],
)
def test_negatives_that_hold_nearly_all_the_mass(penalty, beta, offset):
    """The last case pushes H far down, so that what is left is all there is.

    As the difference of two sums it would be a few per cent wrong.
    """
    case = make_case(
        n=32,
        v=64,
        std=1.0,
        negative_scope="all",
        max_negatives=8,
        penalty=penalty,
        beta=beta,
        crr_lambda=0.3,
    )
    head = case.head.clone()
    for h in case.hidden:
        h[:, 0] = 1.0
    head[:, 0] = offset
    # Six tokens are far above all others; the target is among the others.
    head[3:9, 0] += 22.0
    case = replace(case, head=head)
    truth, ours = run_case(case, "reference"), run_case(case, "torch")
    assert (truth.output.rows.p_target[~torch.isin(case.targets, torch.arange(3, 9))] < 1e-6).any()
    assert_close(ours, truth, 1e-5, floor=1e-2)


def test_reductions_and_upstream_gradients():
    case = make_case(n=21, dtype=torch.float64)
    weights = torch.rand(21, dtype=torch.float64) + 0.5
    rows = run_case(case, "torch", upstream=weights, reduction="none", loss_scale=0.5)
    truth = run_case(case, "reference", upstream=weights, reduction="none", loss_scale=0.5)
    assert rows.output.loss.shape == (21,)
    assert_close(rows, truth, 1e-10)
    total, scaled = run_case(case), run_case(case, upstream=torch.tensor(-3.0), loss_scale=1 / 21)
    assert distance(scaled.head, total.head * (-3 / 21)) < 1e-12
    mean = run_case(case, reduction="mean")
    assert distance(mean.output.loss.detach(), total.output.loss.detach() / 21) < 1e-12
    assert distance(mean.hidden[1], total.hidden[1] / 21) < 1e-12


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_and_no_grad_count_once(reentrant, reduction):
    case = make_case(dtype=torch.float64)
    weight = (
        torch.arange(1.0, 38.0, dtype=torch.float64)
        if reduction == "none"
        else torch.tensor(0.25, dtype=torch.float64)
    )
    expected = run_case(case, upstream=weight, reduction=reduction)
    hidden = [h.clone().requires_grad_() for h in case.hidden]
    head = case.head.clone().requires_grad_()

    def loss(*tensors):
        return cross_layer_loss(
            tensors[0],
            tensors[1:-1],
            tensors[-1],
            case.targets,
            case.lists,
            case.rewards,
            case.options,
            reduction=reduction,
        ).loss

    with torch.no_grad():
        assert not loss(*hidden, head).requires_grad
    checkpoint(loss, *hidden, head, use_reentrant=reentrant).backward(weight)
    assert distance(head.grad, expected.head) < 1e-12
    assert all(distance(h.grad, e) < 1e-12 for h, e in zip(hidden, expected.hidden, strict=True))


@pytest.mark.parametrize(
    "scopes",
    [
        {},
        dict(negative_scope="all", distill_scope="all"),
        dict(softmax_scope="valid_next", distill_scope="valid_next"),
    ],
)
def test_autocast_changes_no_bit(scopes):
    case = make_case(crr_lambda=0.3, **scopes)
    plain = run_case(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert (case.hidden[0] @ case.head.T).dtype == torch.bfloat16
        inside = run_case(case)
    assert torch.equal(inside.output.loss, plain.output.loss) and torch.equal(
        inside.head, plain.head
    )
    assert all(torch.equal(a, b) for a, b in zip(inside.hidden, plain.hidden, strict=True))


@pytest.mark.slow
def test_inside_a_compiled_function(monkeypatch):
    """The call breaks the graph; what stands around it is compiled.

    Loss and gradients are those of the plain function.
    """
    case = make_case(crr_lambda=0.3)

    def loss(scale, head, *hidden):
        hidden = [torch.tanh(h) * scale for h in hidden]
        out = cross_layer_loss(
            hidden[0],
            hidden[1:],
            head * 2,
            case.targets,
            case.lists,
            case.rewards,
            case.options,
            loss_scale=1 / 37,
        )
        return out.loss * scale.exp(), out.rows.num_negatives

    def gradients(fn):
        leaves = [t.clone().requires_grad_() for t in (torch.tensor(0.7), case.head, *case.hidden)]
        value, negatives = fn(*leaves)
        value.backward()
        return [value.detach(), negatives, *(leaf.grad for leaf in leaves)]

    # The other tests do without.
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    compiled = torch.compile(loss, backend="aot_eager")
    for _ in range(2):
        assert all(
            distance(a, b) < 1e-6 for a, b in zip(gradients(compiled), gradients(loss), strict=True)
        )


@pytest.mark.parametrize("softmax,negatives", [("all", "all"), ("valid_next", "valid_next")])
def test_twenty_runs_are_bitwise_equal(softmax, negatives):
    case = make_case(
        softmax_scope=softmax,
        negative_scope=negatives,
        crr_lambda=0.3,
        mu=0.5,
        workspace_bytes=60_000,
    )
    first = run_case(case)
    for _ in range(19):
        again = run_case(case)
        assert torch.equal(again.output.loss, first.output.loss) and torch.equal(
            again.head, first.head
        )
        assert all(torch.equal(a, b) for a, b in zip(again.hidden, first.hidden, strict=True))


def test_scopes_cost_in_proportion_to_their_size():
    """Products are counted: the lists' do not grow with V.

    A row whose list is its target alone has none.
    """

    def flops(v, longest, **scopes):
        starts = torch.arange(64) * 7
        # No two rows share a list.
        tokens = (starts[:, None] + torch.arange(longest)).flatten()
        lists = TokenLists(torch.arange(65) * longest, tokens)
        options = LossOptions(vocab_size=v, crr_lambda=0.3, **scopes)
        case = make_case(n=64, v=v)
        case = Case(case.hidden, case.head, starts, lists, torch.rand(len(tokens)), options)
        with FlopCounterMode(display=False) as counter:
            run_case(case)
        return counter.get_total_flops()

    lists: dict[str, Any] = dict(softmax_scope="valid_next", distill_scope="valid_next")
    # There are 3 products of 3 streams at each entry.
    assert flops(600, 4, **lists) == 3 * 3 * 2 * 16 * 64 * 4
    assert flops(600, 16, **lists) == 4 * flops(600, 4, **lists) == flops(6000, 16, **lists)
    assert flops(600, 1, **lists) == 0
    for scope in (
        "valid_next",
        "item_tokens",
    ):
        # The final layer covers the vocabulary, the layers the items; what addmm_ does is
        # not counted.
        assert flops(6000, 4, negative_scope=scope, item_tokens=(0, 500)) == 2 * 2 * 16 * 64 * (
            6000 + 2 * 500
        )


def test_backward_twice_accumulates():
    case = make_case(dtype=torch.float64)
    hidden, head = (
        [h.clone().requires_grad_() for h in case.hidden],
        case.head.clone().requires_grad_(),
    )
    loss = cross_layer_loss(
        hidden[0], hidden[1:], head, case.targets, case.lists, case.rewards, case.options
    ).loss
    loss.backward(retain_graph=True)
    once = head.grad.clone()
    loss.backward()
    assert distance(head.grad, 2 * once) < 1e-12


def test_tied_frozen_and_partly_trainable_heads():
    case = make_case(dtype=torch.float64)
    tokens = torch.randint(0, 61, (37,), generator=torch.Generator().manual_seed(3))
    grads = []
    for backend in ("torch", "reference"):
        table = case.head.clone().requires_grad_()
        x = table[tokens] + case.hidden[0]
        options = replace(case.options, backend=backend)
        cross_layer_loss(
            x, [x * 0.5, x * 0.8], table, case.targets, case.lists, case.rewards, options
        ).loss.backward()
        grads.append(table.grad)
    assert distance(*grads) < 1e-9

    hidden = [h.clone().requires_grad_() for h in case.hidden]
    cross_layer_loss(
        hidden[0], hidden[1:], case.head, case.targets, case.lists, case.rewards, case.options
    ).loss.backward()
    whole = run_case(case)
    assert distance(hidden[0].grad, whole.hidden[0]) < 1e-12

    for rows in ((10, 25), torch.tensor([0, 7, 8, 30, 60])):
        for soft in ("all", "valid_next"):
            picked = replace(case, options=replace(case.options, softmax_scope=soft))
            part, full = run_case(picked, trainable_rows=rows), run_case(picked)
            expected = torch.zeros_like(full.head)
            index = rows if isinstance(rows, torch.Tensor) else torch.arange(*rows)
            expected[index] = full.head[index]
            assert distance(part.head, expected) < 1e-12
            assert (
                distance(run_case(picked, "reference", trainable_rows=rows).head, expected) < 1e-9
            )
            if isinstance(rows, torch.Tensor):
                continue
            for backend, reduction in (("torch", "sum"), ("torch", "none"), ("reference", "sum")):
                # As a tensor of its own, of which the last row stands for none.
                apart = torch.cat([case.head[slice(*rows)], case.head[:1]]).requires_grad_()
                found = run_case(
                    picked, backend, trainable_rows=rows, trained_rows=apart, reduction=reduction
                )
                assert found.head is None
                assert distance(apart.grad[:-1], expected[slice(*rows)]) < 1e-9
                assert distance(found.hidden[0], part.hidden[0]) < 1e-9
                assert not apart.grad[-1].any()
    for rows, apart, words in (
        ((10, 25), case.head[:14], "at least 15 rows"),
        ((10, 25), case.head[10:25].float(), "torch.float64"),
        (torch.tensor([3]), case.head[:1], "as a range"),
    ):
        with pytest.raises(ValueError, match=words):
            run_case(case, trainable_rows=rows, trained_rows=apart)


def test_it_is_a_library_of_its_own():
    """torch and Triton alone, nothing of ilrec_dist, wherever in a module the import
    stands.
    """
    used = set()
    for file in Path(ilrec_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            used |= {name.split(".")[0] for name in names}
    assert used - set(sys.stdlib_module_names) == {"torch", "triton", "ilrec_kernels"}


def test_bad_calls_are_refused():
    case = make_case()
    hidden, o = case.hidden, case.options

    def call(**changed):
        given = dict(
            final_hidden=hidden[0],
            layer_hidden=hidden[1:],
            head_weight=case.head,
            targets=case.targets,
            candidates=case.lists,
        )
        return cross_layer_loss(**{**given, "rewards": case.rewards, "options": o, **changed})

    with pytest.raises(ValueError, match="rewards"):
        call(rewards=None)
    with pytest.raises(ValueError, match="candidates"):
        call(candidates=None)
    with pytest.raises(ValueError, match="layer_hidden"):
        call(layer_hidden=[])
    with pytest.raises(ValueError, match="targets"):
        call(targets=case.targets + 61)
    with pytest.raises(ValueError, match="head_weight"):
        call(head_weight=case.head[:, :3])
    with pytest.raises(ValueError, match="penalty"):
        LossOptions(vocab_size=3, penalty="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_negatives"):
        LossOptions(vocab_size=3, max_negatives=129)
