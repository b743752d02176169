"""The memory of the head's gradient: all of a rank's rows, or those that train."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ilrec_kernels.layout.segments import add_rows
from ilrec_kernels.layout.vocab_columns import VocabColumns


@dataclass(frozen=True)
class HeadGradient:
    """fp32 (fp64 for fp64 inputs) gradients of the head's rows.

    values   [≥ R, d]
    columns  the R consecutive local columns that `values` are of; None: values are of
             all rows of the shard
    """

    values: Tensor
    columns: VocabColumns | None = None

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """Return which of the local columns [start, stop) have a place here.

        For none, the first is not below the last.
        """
        if self.columns is None:
            return start, stop
        return max(start, self.columns.start), min(stop, self.columns.stop)

    def range(self, start: int, stop: int) -> Tensor:
        """Return the gradient of local columns [start, stop), all with a place here."""
        first = 0 if self.columns is None else self.columns.start
        return self.values[start - first : stop - first]

    def places(self, local: Tensor) -> Tensor:
        """Map local column ids, which have a place here, to rows of `values`."""
        return local if self.columns is None else local - self.columns.start

    def add(self, local: Tensor, gradients: Tensor) -> None:
        """Add gradients [k, d] of local columns int64 [k], with repetitions.

        Those without a place here are left out, and zeroed in `gradients`.
        """
        if self.columns is not None:
            if not len(self.columns):
                return
            local, mask = self.columns.find(local)
            gradients.masked_fill_(~mask[:, None], 0.0)
        add_rows(self.values, local, gradients)
