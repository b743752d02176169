"""What a chunk of rows carries from its logits to its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.exchange import RankStats, Sent
from ilrec_kernels.listed import Gate, Listed
from ilrec_kernels.pairs import Pairs
from ilrec_kernels.problem import Plan, Problem
from ilrec_kernels.ragged import RaggedHead


@dataclass
class Gradients:
    """Where gradients go; None where none is wanted. The head's is fp32 (fp64 for fp64 inputs)."""

    hidden: list[Tensor | None]
    head: Tensor | None
    scale: Tensor  # [N]: what each row's loss is multiplied by


@dataclass(frozen=True)
class Scratch:
    """Memory that every chunk of a call uses anew: without it each would fault its pages in again."""

    logits: Tensor  # flat
    teacher: Tensor  # flat
    desk: Tensor  # flat, and all chunks' of a call: nothing stays on it

    @staticmethod
    def make(p: Problem, plan: Plan, count: int) -> list[Scratch]:
        """For `count` chunks whose logits are held at once."""
        rows = 0 if plan.sliced else min(plan.rows, p.n)

        def memory(size: int) -> Tensor:
            return torch.empty(size, dtype=p.dtype, device=p.head.device)

        desk = memory(plan.desk)
        return [
            Scratch(memory(rows * plan.logits), memory(rows * plan.teacher), desk)
            for _ in range(count)
        ]


@dataclass(frozen=True)
class Factors:
    """What a chunk's exponentials are multiplied by to become gradients."""

    final: Tensor  # [n] of e^(z − top): the cross-entropy's share and the soft label's
    target: Tensor  # [n] what the target's logit gets besides
    sent: Tensor  # [E] the whole gradient of the sent entries
    teacher: Tensor | None  # [n] of the teacher's exponentials, negative
    layer: Tensor | None  # [m, n] of the layers'


@dataclass
class Chunk:
    """The state of rows [begin, end) between the statistics and the gradients."""

    begin: int
    end: int
    x: Tensor  # [S, n, d], in the rows' dtype
    y: Tensor  # [n] local column of the target; 0 where another rank owns it
    owned: Tensor  # bool [n]
    row: Tensor  # arange(n)
    scratch: Scratch
    sent: Sent
    pairs: Pairs | None = None  # of the whole vocabulary
    local: Pairs | None = None  # of this rank's shard
    ragged: RaggedHead | None = None
    z_final: Tensor | None = (
        None  # [n, c]: logits, then e^(z − max) without the sent candidates, then gradients
    )
    z_layers: Tensor | None = (
        None  # [m, n, c]: logits, then e^(z − max) over the distill columns, then gradients
    )
    p_final: Tensor | None = None  # [P]: the same at the pairs
    p_layers: Tensor | None = None  # [m, P]
    teacher: Tensor | None = (
        None  # e^(z − max) of the final layer over the distill scope: [n, c], or [P]; None where z_final is that
    )
    teacher_sent: Tensor | None = None  # [E] the same at the sent entries, where z_final has 0
    stats: RankStats | None = None
    gate: Gate | None = (
        None  # what the row kernels are to list as candidates, in columns of the final layer's logits
    )
    listed: Listed | None = None  # what they listed
    place: Tensor | None = (
        None  # int64 [E]: where on those lists the sent entries are; None: all places were sent
    )

    def desk(self, rows: slice, columns: int) -> Tensor:
        """[rows, columns] of the scratch memory: room for a few tiles."""
        count = rows.stop - rows.start
        return self.scratch.desk[: count * columns].view(count, columns)

    def sent_in(self, tiles: list[slice], columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, which of the sent entries lie in them, where in a matrix [rows, columns]) of each tile of the final layer's logits."""
        bounds = torch.tensor([rows.start for rows in tiles] + [self.n], device=self.row.device)
        edges = torch.searchsorted(self.sent.row, bounds).tolist()
        for rows, low, high in zip(tiles, edges[:-1], edges[1:], strict=True):
            yield rows, slice(low, high), self.sent.slot[low:high] - rows.start * columns

    @property
    def n(self) -> int:
        return self.end - self.begin
