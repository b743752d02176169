"""A loss case with the head cut over ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from ilrec_dist.testing.distributed import Mesh
from tests.support.loss_cases import Case, Outcome, run_case


def sharded(mesh: Mesh, cases: list[Case], edges: list[int], backend: str) -> list[Outcome]:
    """Run each case with this rank's shard of the head.

    Edges beyond the vocabulary are padding, filled with large values.
    """
    out = []
    start, stop = edges[mesh.tp_rank], edges[mesh.tp_rank + 1]
    for case in cases:
        padded = torch.cat(
            [
                case.head,
                torch.full(
                    (max(0, edges[-1] - len(case.head)), case.head.shape[1]),
                    9.0,
                    dtype=case.head.dtype,
                ),
            ]
        )
        out.append(
            run_case(
                case,
                backend,
                head=padded[start:stop],
                vocab=(start, stop),
                tp_group=mesh.tp_group,
                loss_scale=0.1,
            )
        )
    return out


def whole(outcomes: list[Outcome], case: Case) -> Outcome:
    """Put the head's shards together; everything else is the same on each rank."""
    head = torch.cat([o.head for o in outcomes if o.head is not None])
    assert not head[len(case.head) :].any()
    for other in outcomes[1:]:
        assert torch.equal(other.output.loss, outcomes[0].output.loss)
        for a, b in zip(outcomes[0].hidden, other.hidden, strict=True):
            assert torch.equal(a, b) if a is not None and b is not None else a is b
    return replace(outcomes[0], head=head[: len(case.head)])
