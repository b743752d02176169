"""Rows of the vocabulary as parameters of
their own, apart from the rest of their tables.

The optimizer then holds state for these rows alone, or gives
them a learning rate of their own, while the other rows of
the embedding and the head are frozen or trained as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilrec_dist.model.lookup import looked_up
from ilrec_dist.model.sharding import RowRangeSpec, mark_parallel

EMBEDDING, HEAD = "embedding", "head"


class TrainedRows(nn.Module):
    """This rank's part of the vocabulary rows
    [start, stop), of the embedding and the head.

    tables: EMBEDDING's weight and, where it is not tied to it, HEAD's, this rank's rows
    `vocab_range` of the `vocab_rows` of each; their values are the parameters' first
    ones. The tables themselves stay whole: the rows are copied into them before they
    are used, so that lookups and products are the same as without this module. A rank
    that owns none of the rows has a parameter of one row, which nothing reads: the
    optimizer takes no empty one.
    """

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        vocab_range: tuple[int, int],
        vocab_rows: int,
        start: int,
        stop: int,
    ) -> None:
        super().__init__()
        self.start, self.stop = start, stop
        self.first_token = vocab_range[0]
        low, high = (min(max(edge, vocab_range[0]), vocab_range[1]) for edge in (start, stop))
        # Rows of the local tables.
        self.low, self.high = low - vocab_range[0], high - vocab_range[0]
        self.weights = nn.ParameterDict()
        spec = RowRangeSpec(start=start, stop=stop, table_rows=vocab_rows)
        for name, table in tables.items():
            rows = table.detach()[self.low : self.high]
            first = rows if len(rows) else rows.new_zeros(1, table.shape[1])
            self.weights[name] = nn.Parameter(first.clone())
            mark_parallel(self.weights[name], spec)

    def embed(
        self, table: Tensor, tokens: Tensor, summed: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """The embeddings of tokens int64 [B, S] of the whole vocabulary, [B, S, d].

        summed: sums those of the ranks, of which one has each token; None where this
        rank has all. A gradient of the rows is summed in fp32 and rounded once.
        """
        local = tokens - self.first_token
        owned = (local >= 0) & (local < len(table))
        hidden = looked_up(table, local.masked_fill(~owned, 0))
        is_row = (local >= self.low) & (local < self.high)
        rows = self.weights[EMBEDDING]
        index = (local - self.low).masked_fill(~is_row, 0)
        row = F.embedding(index, rows.float()).to(rows.dtype)
        hidden = torch.where(is_row[..., None], row, hidden)
        return hidden if summed is None else summed(hidden.masked_fill(~owned[..., None], 0))

    @property
    def head_rows(self) -> nn.Parameter:
        """The rows of the head: those of the embedding where they are tied."""
        rows: nn.Parameter = self.weights[HEAD if HEAD in self.weights else EMBEDDING]
        return rows

    def head(self, table: Tensor) -> Tensor:
        """The head's table [V_local, d], whose gradient reaches the rows and the table.

        A frozen table comes without a gradient: that of the rows is asked for apart.
        """
        if not table.requires_grad:
            self._copy_into(table, self.head_rows)
            return table.detach()
        through: Tensor = _TableWithRows.apply(  # type: ignore[no-untyped-call]
            self.head_rows, table, self.low, self.high
        )
        return through

    def _copy_into(self, table: Tensor, rows: Tensor) -> None:
        # Through `data`, because autograd would take the copy for a change of what an earlier
        # call's graph still needs, though the values are the same until the optimizer's step.
        table.data[self.low : self.high] = rows.detach()[: self.high - self.low]

    @torch.no_grad()
    def write_to(self, tables: Mapping[str, Tensor]) -> None:
        """Copy the rows into their tables."""
        for name, table in tables.items():
            table[self.low : self.high] = self.weights[name][: self.high - self.low]

    @torch.no_grad()
    def read_from(self, tables: Mapping[str, Tensor]) -> None:
        """Take the rows' values from their tables."""
        for name, table in tables.items():
            self.weights[name][: self.high - self.low] = table[self.low : self.high]


class _TableWithRows(torch.autograd.Function):
    """The table after the rows were copied into
    it; its gradient is divided between the two.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, low: int, high: int) -> Tensor:
        ctx.low, ctx.high, ctx.num_rows = low, high, len(rows)
        # As in TrainedRows._copy_into.
        table.data[low:high] = rows[: high - low]
        return table.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        of_rows = grad.new_zeros(ctx.num_rows, grad.shape[1])
        of_rows[: ctx.high - ctx.low] = grad[ctx.low : ctx.high]
        of_table = grad.clone()
        of_table[ctx.low : ctx.high] = 0
        return of_rows, of_table, None, None
