"""Vocabulary-parallel calls, and rows spread over ranks and steps, against one process.

METHOD.md §7, §8.3, 4, 6.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ilrec_kernels import cross_layer_loss, loop

from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.loss_cases import Case, Outcome, assert_close, make_case, run_case, split_rows
from tests.support.loss_shards import sharded, whole

pytestmark = pytest.mark.slow


def parallel_cases(dtype: torch.dtype) -> list[Case]:
    base: dict[str, Any] = dict(max_negatives=5, mu=0.5, crr_lambda=0.3, dtype=dtype)
    scattered = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34, 55, 56])
    return [
        make_case(**base),
        make_case(softmax_scope="valid_next", distill_scope="valid_next", **base),
        make_case(
            softmax_scope="valid_next",
            negative_scope="item_tokens",
            item_tokens=scattered,
            penalty="multiplicative",
            **base,
        ),
        make_case(negative_scope="all", distill_scope="all", workspace_bytes=60_000, **base),
        make_case(
            negative_scope="item_tokens", distill_scope="valid_next", negatives_from="final", **base
        ),
        make_case(negative_scope="all", negative_threshold=1e-3, **base),
        make_case(beta=0.0, mu=0.0, crr_lambda=0.0, dtype=dtype),
        make_case(beta=0.0, mu=0.0, crr_lambda=0.0, softmax_scope="valid_next", dtype=dtype),
        make_case(n=1, **base),
        make_case(n=0, **base),
    ]


@pytest.mark.parametrize(
    "edges",
    [
        [0, 64],
        [0, 32, 64],
        [0, 7, 61],
        [0, 61, 61],
        [0, 0, 64],
        [0, 16, 32, 48, 64],
        [0, 40, 40, 59, 72],
        [0, 61, 61, 64, 80],
    ],
)
def test_shards_give_what_one_process_gives(edges):
    tp = len(edges) - 1
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        cases = parallel_cases(dtype)
        ranks = run_distributed(sharded, tp, tp, cases, edges, "torch")
        for i, case in enumerate(cases):
            assert_close(
                whole([r[i] for r in ranks], case),
                run_case(case, "reference", loss_scale=0.1),
                tolerance,
            )
    ranks = run_distributed(sharded, tp, tp, cases[:1], edges, "reference")
    assert_close(
        whole([r[0] for r in ranks], cases[0]),
        run_case(cases[0], "reference", loss_scale=0.1),
        1e-5,
    )


def partly_trained(
    mesh: Mesh, case: Case, edges: list[int], rows: Any, apart: bool = False
) -> Outcome:
    start, stop = edges[mesh.tp_rank], edges[mesh.tp_rank + 1]
    trained = None
    if apart:
        low, high = (min(max(edge, start), stop) for edge in rows)
        # A rank without such rows has one that stands for none.
        trained = case.head[low : max(high, low + 1)].clone().requires_grad_()
    outcome = run_case(
        case,
        head=case.head[start:stop],
        vocab=(start, stop),
        tp_group=mesh.tp_group,
        loss_scale=0.1,
        trainable_rows=rows,
        trained_rows=trained,
    )
    if trained is None:
        return outcome
    head = torch.zeros_like(case.head[start:stop])
    head[low - start : high - start] = trained.grad[: high - low]
    return replace(outcome, head=head)


@pytest.mark.parametrize(
    ("rows", "apart"),
    [((10, 45), False), ((10, 45), True), ((30, 61), True), (torch.tensor([0, 7, 30, 60]), False)],
)
def test_partly_trainable_heads_in_shards(rows, apart):
    case = make_case(dtype=torch.float64)
    ranks = run_distributed(partly_trained, 2, 2, case, [0, 20, 61], rows, apart)
    assert_close(
        whole(ranks, case), run_case(case, "reference", loss_scale=0.1, trainable_rows=rows), 1e-9
    )


def test_ties_across_shards_go_to_the_lower_token():
    case = make_case(n=12, v=64, negative_scope="all", max_negatives=3, dtype=torch.float64)
    # small integers: equal logits are equal to the bit whatever the order of the sums
    hidden = [(2 * h).round() for h in case.hidden]
    case = replace(
        case, hidden=hidden, head=(2 * case.head[:8]).round().repeat(8, 1), targets=case.targets % 8
    )
    ranks = run_distributed(sharded, 4, 4, [case], [0, 16, 32, 48, 64], "torch")
    assert_close(
        whole([r[0] for r in ranks], case), run_case(case, "reference", loss_scale=0.1), 1e-9
    )


def in_turn(mesh: Mesh, case: Case, edges: list[int], ahead: bool) -> tuple[list[str], Outcome]:
    """Return what the chunks did when, and what came of it.

    Without `ahead` each chunk is finished before the next begins.
    """
    events: list[str] = []

    def noted(name: str, call: Any) -> Any:
        return lambda *args, **kwargs: (events.append(name), call(*args, **kwargs))[1]

    kept = loop.start_chunk, loop.merge, loop.make_plan
    try:
        loop.start_chunk, loop.merge = noted("start", kept[0]), noted("merge", kept[1])
        if not ahead:
            loop.make_plan = lambda p: replace(kept[2](p), chunks_in_flight=1)
        return events, sharded(mesh, [case], edges, "torch")[0]
    finally:
        loop.start_chunk, loop.merge, loop.make_plan = kept


@pytest.mark.parametrize(
    "settings",
    [
        dict(negative_scope="all", distill_scope="all"),
        dict(softmax_scope="valid_next", distill_scope="item_tokens"),
    ],
)
def test_exchanges_that_overlap_the_next_chunk_change_no_bit(settings):
    case = make_case(n=40, v=64, mu=0.5, crr_lambda=0.3, workspace_bytes=40_000, **settings)
    overlapped, plain = (
        run_distributed(in_turn, 2, 2, case, [0, 40, 64], ahead) for ahead in (True, False)
    )
    for (events, ours), (in_order, theirs) in zip(overlapped, plain, strict=True):
        assert events[:3] == ["start", "start", "merge"] and in_order[:3] == [
            "start",
            "merge",
            "start",
        ]
        assert torch.equal(ours.output.loss, theirs.output.loss) and torch.equal(
            ours.head, theirs.head
        )
        assert all(torch.equal(a, b) for a, b in zip(ours.hidden, theirs.hidden, strict=True))


def accumulated(
    mesh: Mesh, case: Case, cuts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Run this data-parallel rank's micro-batches, [cut[i], cut[i+1]) each.

    The head's gradient is summed over ranks.
    """
    n, mine = len(case.targets), cuts[mesh.dp_rank]
    head = case.head.clone().requires_grad_()
    total, hidden_grads = torch.zeros((), dtype=head.dtype), []
    for begin, end in zip(mine, mine[1:], strict=False):
        part = split_rows(case, begin, end)
        hidden = [h.clone().requires_grad_() for h in part.hidden]
        out = cross_layer_loss(
            hidden[0],
            hidden[1:],
            head,
            part.targets,
            part.lists,
            part.rewards,
            part.options,
            loss_scale=1 / n,
        )
        out.loss.backward()
        total += out.loss.detach()
        hidden_grads.append(
            torch.stack([h.grad if h.grad is not None else torch.zeros_like(h) for h in hidden])
        )
    dist.all_reduce(total)
    assert head.grad is not None
    dist.all_reduce(head.grad)
    return total, head.grad, hidden_grads


@pytest.mark.parametrize(
    "cuts", [[[0, 27], [27, 36]], [[0, 5, 6, 27], [27, 36]], [[0, 36], [36, 36]]]
)
def test_uneven_rows_and_accumulation_equal_one_batch(cuts):
    case = make_case(n=36, mu=0.5, crr_lambda=0.3, dtype=torch.float64)
    # The second rank's rows have no negatives: the target is far above every other token in
    # the layers.
    for h in case.hidden[1:]:
        h[27:] = 40 * case.head[case.targets[27:]]
    expected = run_case(case, loss_scale=1 / 36)
    assert (
        not expected.output.rows.num_negatives[27:].any()
        and expected.output.rows.num_negatives[:27].any()
    )
    ranks = run_distributed(accumulated, 2, 1, case, cuts)
    for total, head_grad, _ in ranks:
        torch.testing.assert_close(total, expected.output.loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(head_grad, expected.head, rtol=1e-10, atol=1e-12)
    for stream, grad in enumerate(expected.hidden):
        rows = torch.cat([part[stream] for _, _, parts in ranks for part in parts])
        torch.testing.assert_close(rows, grad, rtol=1e-10, atol=1e-12)
