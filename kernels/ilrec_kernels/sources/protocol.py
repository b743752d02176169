"""What the loop asks of whatever makes a chunk's logits."""

from __future__ import annotations

from typing import Protocol

from ilrec_kernels.chunk import Chunk, ChunkGradients, Factors
from ilrec_kernels.steps.head_product import HeadProduct


class LogitSource(Protocol):
    """One way to make and use the logits of one chunk, for the scopes that it serves.

    A source is made for a chunk, and makes its logits then. A call has a dense source,
    a source of list scopes, or both; the one that proposes negatives goes first.
    """

    def statistics(self, chunk: Chunk) -> None:
        """Write this rank's part of `chunk.stats`.

        The source that serves the negatives' scope sets `chunk.candidates`;
        the source of the softmax leaves them out of its normaliser.
        """

    def backward(
        self, chunk: Chunk, factors: Factors, gradients: ChunkGradients
    ) -> list[HeadProduct]:
        """Add the hidden rows' gradient, and the head's or a part of it.

        Returns the products with the hidden rows that are still to be added to
        the head's gradient, so that the hidden rows' all-reduce overlaps them.
        """
