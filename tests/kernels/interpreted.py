"""The triton backend under Triton's interpreter. Run by test_triton.py with TRITON_INTERPRET=1, which Triton reads when it is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ilrec_kernels import chunked, cross_layer_loss, fused, problem, sliced
from ilrec_kernels.negatives import target_ensemble
from torch.utils._python_dispatch import TorchDispatchMode

from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.kernels.cases import Case, Outcome, assert_close, make_case, run_case
from tests.kernels.test_parallel import sharded, whole
from tests.kernels.test_workspace import live_bytes

SETTINGS: list[dict[str, Any]] = [
    dict(),
    dict(negative_scope="all", distill_scope="all", workspace_bytes=120_000),
    dict(negative_scope="item_tokens", item_tokens=(5, 40)),
    dict(
        negative_scope="all",
        distill_scope="item_tokens",
        item_tokens=(20, 30),
        penalty="multiplicative",
        beta=0.1,
    ),
    dict(negative_scope="item_tokens", softmax_scope="valid_next"),
    dict(distill_scope="valid_next", negatives_from="final", negative_scope="all"),
    dict(item_tokens=torch.tensor([1, 2, 3, 5, 8, 13, 21])),
    dict(
        item_tokens=torch.tensor([1, 2, 3, 5, 8, 13, 21]),
        negative_scope="item_tokens",
        distill_scope="all",
    ),
    dict(
        item_tokens=torch.tensor([1, 2, 3, 5, 8, 13, 21]),
        negative_scope="item_tokens",
        negatives_from="final",
        mu=0.0,
    ),
    dict(beta=0.0, mu=0.0, crr_lambda=0.0),
    dict(beta=0.0, crr_lambda=0.0, m=3),
    dict(negative_scope="all", n=1, m=1),
    dict(negative_scope="all", n=0),
    dict(
        negative_scope="all", v=2600, n=3, m=1, negative_threshold=1e-4
    ),  # more candidates than a list has room for
    dict(
        negative_scope="item_tokens",
        item_tokens=(1100, 2500),
        v=2600,
        n=3,
        negative_threshold=1e-4,
        distill_scope="all",
    ),
    dict(
        negative_scope="all",
        v=1500,
        n=3,
        negative_threshold=1e-4,
        max_negatives=128,
        negatives_from="final",
        mu=0.0,
    ),
    dict(
        negative_scope="item_tokens",
        item_tokens=(100, 1300),
        v=1500,
        n=3,
        negative_threshold=1e-4,
        softmax_scope="valid_next",
    ),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_agrees_with_the_reference(settings):
    case = make_case(**{"n": 11, "crr_lambda": 0.3, "mu": 0.5, "max_negatives": 5, **settings})
    assert_close(run_case(case, "triton"), run_case(case, "reference"), 1e-5)


def whole_numbers(case: Case) -> Case:
    """With logits that are small whole numbers: most values of a row are tied, exactly and on every backend."""
    return replace(
        case,
        hidden=[h.round().clamp(-1, 1) for h in case.hidden],
        head=(case.head * 3).round().clamp(-1, 1),
    )


@pytest.mark.parametrize("workspace", [None, 130_000])
@pytest.mark.parametrize(
    "settings",
    [
        dict(max_negatives=1),
        dict(max_negatives=60, m=3),
        dict(max_negatives=128, negatives_from="final"),
    ],
)
def test_ties_go_to_the_lower_token(settings, workspace, monkeypatch):
    """In regime T, and across slices in regime V, where many more are tied at the cut than a list has room for."""
    monkeypatch.setattr(problem, "SMALL_CHUNK", 12 if workspace else 0)
    used = []
    collect = sliced.collect
    monkeypatch.setattr(sliced, "collect", lambda *a: used.append(1) or collect(*a))
    common: dict[str, Any] = dict(
        n=9,
        v=2300,
        longest=20,
        negative_scope="all",
        negative_threshold=0.1,
        mu=0.5,
        crr_lambda=0.3,
        distill_scope="all",
    )
    case = whole_numbers(make_case(**common, workspace_bytes=workspace, **settings))
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert bool(used) == bool(workspace) and truth.output.rows.capped.any()
    assert_close(ours, truth, 1e-5)


@pytest.mark.parametrize("edges", [[0, 32, 64], [0, 61, 61]])
def test_shards_agree_with_the_reference(edges):
    """There are more candidates of a row than the ranks exchange."""
    base: dict[str, Any] = dict(n=7, max_negatives=5, mu=0.5, crr_lambda=0.3)
    dense = dict(negative_scope="all", distill_scope="all")
    cases = [
        make_case(**base),
        make_case(**dense, **base),
        make_case(negative_scope="all", negative_threshold=1e-3, **base),
    ]
    ranks = run_distributed(sharded, 2, 2, cases, edges, "triton")
    for i, case in enumerate(cases):
        assert_close(
            whole([r[i] for r in ranks], case), run_case(case, "reference", loss_scale=0.1), 1e-5
        )


@pytest.mark.parametrize("distill", ["item_tokens", "all"])
def test_half_precision_gradients_are_rounded_once(distill):
    case = make_case(
        n=9,
        v=130,
        d=32,
        distill_scope=distill,
        item_tokens=(0, 100),
        negative_scope="all",
        crr_lambda=0.3,
        mu=0.5,
        dtype=torch.bfloat16,
    )
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert_close(replace(ours, hidden=truth.hidden, head=truth.head), truth, 1e-5)
    for a, b in zip([ours.head, *ours.hidden], [truth.head, *truth.hidden], strict=True):
        assert (a.double() - b.double()).norm() <= 5e-3 * b.double().norm()


@pytest.mark.parametrize("is_sliced", [False, True])
def test_twenty_runs_are_bitwise_equal(is_sliced, monkeypatch):
    """In regime T and, several slices in each of several chunks, in regime V."""
    monkeypatch.setattr(problem, "SMALL_CHUNK", 20 if is_sliced else 1 << 30)
    monkeypatch.setattr(problem, "SLICE", 128)
    scope = (
        dict(v=160, workspace_bytes=9_000, distill_scope="all")
        if is_sliced
        else dict(negative_scope="all")
    )
    case = make_case(n=7 if is_sliced else 4, crr_lambda=0.3, mu=0.5, longest=20, **scope)
    used = []
    collect = sliced.collect
    monkeypatch.setattr(sliced, "collect", lambda *a: used.append(1) or collect(*a))
    first = run_case(case, "triton")
    assert bool(used) == is_sliced
    for _ in range(19):
        again = run_case(case, "triton")
        assert torch.equal(again.output.loss, first.output.loss) and torch.equal(
            again.head, first.head
        )


@pytest.mark.parametrize("rows", [(10, 25), torch.tensor([0, 7, 8, 30, 60])])
def test_partly_trainable_heads_and_rows_of_their_own(rows):
    case = make_case(n=9, negative_scope="all", crr_lambda=0.3, mu=0.5)
    ours, truth = (
        run_case(case, backend, trainable_rows=rows) for backend in ("triton", "reference")
    )
    assert_close(ours, truth, 1e-5)
    upstream = torch.rand(9) + 0.5
    ours, truth = (
        run_case(case, backend, upstream=upstream, reduction="none", loss_scale=0.5)
        for backend in ("triton", "reference")
    )
    assert_close(ours, truth, 1e-5)


class Questions(TorchDispatchMode):
    """Counts what a GPU's host would have to wait for: sizes and values that it must know."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = "index" in name and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for x in args
            if isinstance(x, list | tuple)
            for i in x
        )
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["all", "item_tokens", "valid_next"])
def test_the_device_is_not_asked_about_dense_candidates(scope, monkeypatch):
    """Alone in regime T every chunk is launched ahead. (Listed negatives, which are counted, show that the test can fail.)"""
    questions, chunks = Questions(), []

    def watched(run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            chunks.append(run)
            with questions:
                return run(*args, **kwargs)

        return call

    for name in ("start_chunk", "collect_statistics", "merge", "add_gradients"):
        monkeypatch.setattr(chunked, name, watched(getattr(chunked, name)))
    case = make_case(
        n=12,
        v=300,
        mu=0.5,
        crr_lambda=0.3,
        negative_scope=scope,
        negative_threshold=0.1,
        max_negatives=5,
        workspace_bytes=60_000,
    )
    ours = run_case(case, "triton")
    assert len(chunks) > 4 and ours.output.rows.capped.any()
    assert (questions.count > 0) == (scope == "valid_next")


SLICED: list[dict[str, Any]] = [
    dict(),
    dict(distill_scope="all"),
    dict(distill_scope="all", dtype=torch.bfloat16),
    dict(item_tokens=(700, 2300), m=3, penalty="multiplicative", beta=0.1),
    dict(beta=0.0, mu=0.0, crr_lambda=0.0),
    dict(negatives_from="final", mu=0.0),
    dict(negative_scope="all"),
    dict(negative_scope="all", distill_scope="all", max_negatives=128, negative_threshold=1e-3),
    dict(
        negative_scope="item_tokens",
        item_tokens=(700, 1500),
        distill_scope="all",
        dtype=torch.bfloat16,
    ),
    dict(negative_scope="item_tokens", item_tokens=(700, 2300), mu=0.0, negative_threshold=1e-3),
    dict(negative_scope="all", negatives_from="final", mu=0.0, penalty="multiplicative", beta=0.1),
]


@pytest.mark.parametrize("settings", SLICED)
def test_sliced_regime_agrees_with_the_reference(settings, monkeypatch):
    """Regime V: a workspace that holds a few rows' logits at a time."""
    monkeypatch.setattr(problem, "SMALL_CHUNK", 14)
    used = []
    collect = sliced.collect
    monkeypatch.setattr(sliced, "collect", lambda *a: used.append(1) or collect(*a))
    case = make_case(
        **{
            "n": 15,
            "d": 16,
            "v": 2500,
            "longest": 40,
            "crr_lambda": 0.3,
            "mu": 0.5,
            "max_negatives": 5,
            "workspace_bytes": 130_000,
            **settings,
        }
    )
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert used
    assert_close(replace(ours, hidden=truth.hidden, head=truth.head), truth, 1e-5)
    bound = 5e-3 if settings.get("dtype") is torch.bfloat16 else 1e-5
    for a, b in zip([ours.head, *ours.hidden], [truth.head, *truth.hidden], strict=True):
        if a is not None and b is not None:
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_a_rounded_bar_loses_no_negative(monkeypatch):
    """In regime V z̄(y) is from a product of its own; on a GPU its factors may have been rounded otherwise than the candidates'."""
    monkeypatch.setattr(problem, "SMALL_CHUNK", 14)
    monkeypatch.setattr(
        chunked,
        "target_ensemble",
        lambda *a: (z := target_ensemble(*a)) + 1e-2 * z.abs().clamp(min=1.0),
    )
    case = make_case(
        n=15,
        d=16,
        v=2500,
        longest=40,
        mu=0.0,
        negative_scope="all",
        max_negatives=128,
        negative_threshold=20.0,
        workspace_bytes=130_000,
    )
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert not truth.output.rows.capped.all()
    assert_close(ours, truth, 1e-5)


def sharded_and_sliced(mesh: Mesh, case: Case, edges: list[int]) -> tuple[Outcome, bool]:
    """A shard's outcome and whether regime V made it. The process serves other tests afterwards."""
    used: list[int] = []
    collect, small, narrow = sliced.collect, problem.SMALL_CHUNK, problem.SLICE
    sliced.collect, problem.SMALL_CHUNK, problem.SLICE = (
        lambda *a: used.append(1) or collect(*a),
        40,
        128,
    )
    try:
        return sharded(mesh, [case], edges, "triton")[0], bool(used)
    finally:
        sliced.collect, problem.SMALL_CHUNK, problem.SLICE = collect, small, narrow


@pytest.mark.parametrize("edges", [[0, 300, 600], [0, 560, 560]])
@pytest.mark.parametrize("scope", ["valid_next", "item_tokens"])
def test_the_sliced_regime_in_shards(edges, scope):
    """Uneven, padded, and one of them empty; item tokens in a part of them."""
    options = dict(
        negative_scope=scope,
        item_tokens=(100, 450),
        crr_lambda=0.3,
        mu=0.5,
        max_negatives=5,
        workspace_bytes=90_000,
    )
    case = make_case(n=14, v=560, longest=30, **options)
    ranks = run_distributed(sharded_and_sliced, 2, 2, case, edges)
    assert all(used for _, used in ranks)
    assert_close(
        whole([outcome for outcome, _ in ranks], case),
        run_case(case, "reference", loss_scale=0.1),
        1e-5,
    )


@pytest.mark.parametrize(
    "d,longest,scope", [(96, 20, "valid_next"), (16, 200, "valid_next"), (16, 20, "all")]
)
def test_the_sliced_regime_keeps_to_the_workspace(d, longest, scope, monkeypatch):
    """Wide rows, long lists, many candidates: as few chunks as there is room for, and slices as wide as is left."""
    monkeypatch.setattr(problem, "SMALL_CHUNK", 120)
    spans, widths = [], []
    collect, turn = sliced.collect, fused.turn
    monkeypatch.setattr(
        sliced,
        "collect",
        lambda p, plan, chunk: spans.append((plan, chunk.n)) or collect(p, plan, chunk),
    )
    monkeypatch.setattr(
        fused, "turn", lambda p, z, *rest: widths.append(z.shape[2]) or turn(p, z, *rest)
    )
    n, v, workspace = 60, 1100, 240_000
    options = dict(
        workspace_bytes=workspace, mu=0.5, crr_lambda=0.3, negative_scope=scope, max_negatives=5
    )
    mode = live_bytes(make_case(n=n, v=v, d=d, longest=longest, **options), "triton")
    assert mode.largest <= workspace and mode.peak <= 1.1 * workspace + 40 * n * 8, (
        mode.peak / workspace
    )
    plan = spans[0][0]
    assert len(spans) <= -(-n // plan.rows) + 1 and sum(rows for _, rows in spans) == n
    assert (
        len(widths) == len(spans) * -(-v // plan.slice_columns)
        and max(widths) == plan.slice_columns >= 128
    )
    assert mode.peak >= workspace / 2  # what is there is used


@pytest.mark.parametrize(
    "workspace,n,frozen,sliced",
    [
        (4 << 20, 3000, False, True),
        (1 << 30, 3000, False, False),
        (4 << 20, 100, False, False),
        (4 << 20, 3000, True, False),
    ],
)
def test_the_workspace_chooses_the_regime(workspace, n, frozen, sliced, monkeypatch):
    """V where a chunk of T would be small although there are many rows; a larger workspace, few rows or a frozen head take T."""
    plans = []
    make = problem.make_plan
    monkeypatch.setattr(
        chunked,
        "make_plan",
        lambda p: plans.append(make(p)) or (_ for _ in ()).throw(InterruptedError),
    )
    case = make_case(n=n, d=16, v=20_000, longest=20, workspace_bytes=workspace)
    head = case.head.requires_grad_(not frozen)
    with pytest.raises(InterruptedError):
        cross_layer_loss(
            case.hidden[0].requires_grad_(),
            case.hidden[1:],
            head,
            case.targets,
            case.lists,
            case.rewards,
            case.options.with_backend("triton"),
        )
    assert plans[0].sliced == sliced and plans[0].fused
