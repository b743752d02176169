"""The triton backend under Triton's interpreter.

test_triton.py runs this file with TRITON_INTERPRET=1, which Triton reads when it is
imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ilrec_kernels import cross_layer_loss, loop, plan
from ilrec_kernels.plan import Plan, chunk_spans, make_plan
from ilrec_kernels.problem import DenseSource, Problem
from ilrec_kernels.sources import vocab_slices
from ilrec_kernels.sources.protocol import LogitSource
from ilrec_kernels.steps.negatives import target_ensemble
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from ilrec_dist.testing import distributed
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.live_bytes import live_bytes
from tests.support.loss_cases import Case, Outcome, assert_close, make_case, run_case
from tests.support.loss_shards import sharded, whole


class Patched:
    """The interpreter looks through Triton's language, and puts its own functions in
    their places, at each call of a device function: half of the time of these tests.
    Here, and in the ranks that load this file, it does so once for each module whose
    functions are called, and what it has put in place stays.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.modules: set[str] = set()

    def __call__(self, function: Any) -> Patched:
        if function.__module__ not in self.modules:
            self.patch(function)
            self.modules.add(function.__module__)
        return self

    def restore(self) -> None:
        """Nothing: this process only interprets."""


# Ranks are forked with this file alone.
distributed.PRELOADED[:] = [__name__]
interpreter._patch_lang = Patched(interpreter._patch_lang)

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
    # There are more candidates than a list has room for.
    dict(negative_scope="all", v=2600, n=3, m=1, negative_threshold=1e-4),
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


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """The plans of the test's calls, in order."""
    made: list[Plan] = []
    monkeypatch.setattr(loop, "make_plan", lambda p: made.append(make_plan(p)) or made[-1])
    return made


def sliced(plans: list[Plan]) -> bool:
    """Whether the chunked backend's last call was of regime V."""
    return plans[-1].source is DenseSource.SLICES


@pytest.mark.parametrize("settings", SETTINGS)
def test_agrees_with_the_reference(settings):
    case = make_case(**{"n": 6, "crr_lambda": 0.3, "mu": 0.5, "max_negatives": 5, **settings})
    assert_close(run_case(case, "triton"), run_case(case, "reference"), 1e-5)


def shards(mesh: Mesh, cases: list[Case], edges: list[int]) -> list[Outcome]:
    return sharded(mesh, cases, edges, "triton")


def whole_numbers(case: Case) -> Case:
    """Make logits that are small whole numbers:
    most of a row are tied on every backend.
    """
    return replace(
        case,
        hidden=[h.round().clamp(-1, 1) for h in case.hidden],
        head=(case.head * 3).round().clamp(-1, 1),
    )


@pytest.mark.parametrize("workspace", [None, 110_000])
@pytest.mark.parametrize(
    "settings",
    [
        dict(max_negatives=1),
        dict(max_negatives=60, m=3),
        dict(max_negatives=128, negatives_from="final"),
    ],
)
def test_ties_go_to_the_lower_token(settings, workspace, plans, monkeypatch):
    """In regime T and across slices in regime V; more are tied than a buffer holds."""
    monkeypatch.setattr(plan, "SMALL_CHUNK", 12 if workspace else 0)
    common: dict[str, Any] = dict(
        n=4,
        v=1700,
        longest=20,
        negative_scope="all",
        negative_threshold=0.1,
        mu=0.5,
        crr_lambda=0.3,
        distill_scope="all",
    )
    case = whole_numbers(make_case(**common, workspace_bytes=workspace, **settings))
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert sliced(plans) == bool(workspace) and truth.output.rows.capped.any()
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
    ranks = run_distributed(shards, 2, 2, cases, edges)
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
def test_repeated_runs_are_bitwise_equal(is_sliced, plans, monkeypatch):
    """In regime T and, several slices in each of several chunks, in regime V.

    The interpreter runs one program after the other, so this is about what torch does
    around the kernels; tests/gpu/test_loss.py repeats a call twenty times on a device.
    """
    monkeypatch.setattr(plan, "SMALL_CHUNK", 20 if is_sliced else 1 << 30)
    monkeypatch.setattr(plan, "MIN_SLICE_COLUMNS", 128)
    scope = (
        dict(v=160, workspace_bytes=9_000, distill_scope="all")
        if is_sliced
        else dict(negative_scope="all")
    )
    case = make_case(n=7 if is_sliced else 4, crr_lambda=0.3, mu=0.5, longest=20, **scope)
    first = run_case(case, "triton")
    assert sliced(plans) == is_sliced
    for _ in range(2):
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
    """Counts what a GPU's host would have to
    wait for: sizes and values that it must know.
    """

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
    """On one rank in regime T every chunk is launched ahead.

    Negatives from lists, which are counted, show that the test can fail.
    """
    questions, calls = Questions(), []

    def watched(run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(run)
            with questions:
                return run(*args, **kwargs)

        return call

    def watched_sources(*args: Any) -> list[LogitSource]:
        sources = watched(make_sources)(*args)
        for source in sources:
            source.statistics = watched(source.statistics)
        return sources

    make_sources = loop.make_sources
    monkeypatch.setattr(loop, "make_sources", watched_sources)
    for name in ("start_chunk", "merge", "add_gradients"):
        monkeypatch.setattr(loop, name, watched(getattr(loop, name)))
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
    assert len(calls) > 8 and ours.output.rows.capped.any()
    assert (questions.count > 0) == (scope == "valid_next")


SLICED: list[dict[str, Any]] = [
    dict(),
    dict(distill_scope="all"),
    dict(distill_scope="all", dtype=torch.bfloat16),
    dict(item_tokens=(350, 1150), m=3, penalty="multiplicative", beta=0.1),
    dict(beta=0.0, mu=0.0, crr_lambda=0.0),
    dict(negatives_from="final", mu=0.0),
    dict(negative_scope="all"),
    dict(
        negative_scope="all",
        distill_scope="all",
        max_negatives=128,
        negative_threshold=1e-3,
        workspace_bytes=90_000,
    ),
    dict(
        negative_scope="item_tokens",
        item_tokens=(350, 750),
        distill_scope="all",
        dtype=torch.bfloat16,
    ),
    dict(negative_scope="item_tokens", item_tokens=(350, 1150), mu=0.0, negative_threshold=1e-3),
    dict(negative_scope="all", negatives_from="final", mu=0.0, penalty="multiplicative", beta=0.1),
]


@pytest.mark.parametrize("settings", SLICED)
def test_sliced_regime_agrees_with_the_reference(settings, plans, monkeypatch):
    """Regime V: a workspace that holds a few rows' logits at a time."""
    monkeypatch.setattr(plan, "SMALL_CHUNK", 10)
    case = make_case(
        **{
            "n": 10,
            "d": 16,
            "v": 1500,
            "longest": 40,
            "crr_lambda": 0.3,
            "mu": 0.5,
            "max_negatives": 5,
            "workspace_bytes": 70_000,
            **settings,
        }
    )
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert sliced(plans)
    assert_close(replace(ours, hidden=truth.hidden, head=truth.head), truth, 1e-5)
    bound = 5e-3 if settings.get("dtype") is torch.bfloat16 else 1e-5
    for a, b in zip([ours.head, *ours.hidden], [truth.head, *truth.hidden], strict=True):
        if a is not None and b is not None:
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_a_rounded_threshold_loses_no_negative(monkeypatch):
    """In regime V z̄(y) is from a product of its own.

    On a GPU its factors may have been rounded otherwise than the candidates'.
    """
    monkeypatch.setattr(plan, "SMALL_CHUNK", 10)
    monkeypatch.setattr(
        loop,
        "target_ensemble",
        lambda *a: (z := target_ensemble(*a)) + 1e-2 * z.abs().clamp(min=1.0),
    )
    case = make_case(
        n=10,
        d=16,
        v=1500,
        longest=40,
        mu=0.0,
        negative_scope="all",
        max_negatives=128,
        negative_threshold=20.0,
        workspace_bytes=70_000,
    )
    ours, truth = run_case(case, "triton"), run_case(case, "reference")
    assert not truth.output.rows.capped.all()
    assert_close(ours, truth, 1e-5)


def sharded_and_sliced(mesh: Mesh, case: Case, edges: list[int]) -> tuple[Outcome, bool]:
    """A shard's outcome and whether regime V made it."""
    made: list[Plan] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SMALL_CHUNK", 24)
        patch.setattr(plan, "MIN_SLICE_COLUMNS", 128)
        patch.setattr(loop, "make_plan", lambda p: made.append(make_plan(p)) or made[-1])
        return sharded(mesh, [case], edges, "triton")[0], sliced(made)


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
        workspace_bytes=60_000 if scope == "item_tokens" else 55_000,
    )
    case = make_case(n=8, v=560, longest=30, **options)
    ranks = run_distributed(sharded_and_sliced, 2, 2, case, edges)
    assert all(used for _, used in ranks)
    assert_close(
        whole([outcome for outcome, _ in ranks], case),
        run_case(case, "reference", loss_scale=0.1),
        1e-5,
    )


@pytest.mark.parametrize(
    "d,longest,scope", [(96, 20, "valid_next"), (16, 100, "valid_next"), (16, 20, "all")]
)
def test_the_sliced_regime_keeps_to_the_workspace(d, longest, scope, monkeypatch):
    """Wide rows, long lists, many candidates:
    few chunks, and slices as wide as is left.
    """
    monkeypatch.setattr(plan, "SMALL_CHUNK", 24)
    calls: list[tuple[Problem, Plan]] = []
    monkeypatch.setattr(
        loop, "make_plan", lambda p: calls.append((p, make_plan(p))) or calls[-1][1]
    )
    widths = []
    turn = vocab_slices.logits_to_gradients
    monkeypatch.setattr(
        vocab_slices,
        "logits_to_gradients",
        lambda rows, *rest: widths.append(rows.final.shape[1]) or turn(rows, *rest),
    )
    n, v, workspace = 12, 1000, 90_000
    options = dict(
        workspace_bytes=workspace, mu=0.5, crr_lambda=0.3, negative_scope=scope, max_negatives=5
    )
    mode = live_bytes(make_case(n=n, v=v, d=d, longest=longest, **options), "triton")
    assert mode.largest <= workspace and mode.peak <= 1.1 * workspace + 40 * n * 8, (
        mode.peak / workspace
    )
    ((problem, used),) = calls
    spans = chunk_spans(problem, used)
    assert len(spans) <= -(-n // used.chunk_rows) + 1
    assert len(widths) == len(spans) * -(-v // used.slice_columns)
    assert max(widths) == used.slice_columns >= 128
    # What memory is there is used.
    assert mode.peak >= workspace / 2


@pytest.mark.parametrize(
    "workspace,n,frozen,source",
    [
        (4 << 20, 3000, False, DenseSource.SLICES),
        (1 << 30, 3000, False, DenseSource.TRITON),
        (4 << 20, 100, False, DenseSource.TRITON),
        (4 << 20, 3000, True, DenseSource.TRITON),
    ],
)
def test_the_workspace_chooses_the_regime(workspace, n, frozen, source, monkeypatch):
    """V where a chunk of T would be small although there are many rows.

    A larger workspace, few rows or a frozen head take T.
    """

    class PlannedError(Exception):
        pass

    def plan_only(p: Problem) -> Plan:
        assert make_plan(p).source is source
        raise PlannedError

    monkeypatch.setattr(loop, "make_plan", plan_only)
    case = make_case(n=n, d=16, v=20_000, longest=20, workspace_bytes=workspace)
    head = case.head.requires_grad_(not frozen)
    with pytest.raises(PlannedError):
        cross_layer_loss(
            case.hidden[0].requires_grad_(),
            case.hidden[1:],
            head,
            case.targets,
            case.lists,
            case.rewards,
            replace(case.options, backend="triton"),
        )
