"""What the rows of added tokens begin with (METHOD.md §10)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from ilrec_dist.model.hf.tensor_files import TensorReader
from ilrec_dist.model.sharding import seeded_generator

# Rows of the old vocabulary that are read at a time.
READ_ROWS = 8192
# New rows that one generator draws: a rank draws only the blocks of its own rows.
BLOCK_ROWS = 1024
# The share of the old rows' spread that is added to a mean of title tokens.
TEXT_NOISE = 0.1


@dataclass(frozen=True)
class NewRows:
    """The rows [start, stop) of the vocabulary, which are drawn from the rows before
    them.

    Each row is normal with the mean and the variance of each column over rows 0 …
    start-1. With title_counts (float [stop - start, start]: how often the titles of a
    token's items hold each old token) a row with titles is the mean old row of its
    title tokens, plus that noise × TEXT_NOISE.
    """

    start: int
    stop: int
    title_counts: csr_matrix | None = None

    def draw(
        self, reader: TensorReader, key: str, name: str, seed: int, first: int, last: int
    ) -> Tensor:
        """Rows [first, last) of the new ones, fp32 [last - first, d]; the same for
        every tp.

        Reads the old rows of the checkpoint's tensor `key`, a piece at a time.
        """
        counts = None if self.title_counts is None else self.title_counts[first - self.start :]
        counts = None if counts is None else counts[: last - first].tocsc()
        width = reader.entry(key).shape[1]
        total, squares = torch.zeros(2, width, dtype=torch.float64)
        texts = torch.zeros(last - first, width, dtype=torch.float64)
        for begin, rows in self._old_rows(reader, key):
            total += rows.sum(0)
            squares += rows.square().sum(0)
            if counts is not None:
                texts += torch.from_numpy(counts[:, begin : begin + len(rows)] @ rows.numpy())
        mean = total / self.start
        noise = self._noise(name, seed, first, last, width)
        noise *= (squares / self.start - mean.square()).clamp(min=0).sqrt()
        by_moments: Tensor = (mean + noise).float()
        if counts is None:
            return by_moments
        held = torch.from_numpy(counts.sum(axis=1).A1).double()[:, None]
        from_text = texts / held.clamp(min=1) + TEXT_NOISE * noise
        return torch.where(held > 0, from_text.float(), by_moments)

    def _old_rows(self, reader: TensorReader, key: str) -> Iterator[tuple[int, Tensor]]:
        for begin in range(0, self.start, READ_ROWS):
            end = min(begin + READ_ROWS, self.start)
            yield begin, reader.read(key, 0, begin, end).double()

    def _noise(self, name: str, seed: int, first: int, last: int, width: int) -> Tensor:
        """Standard normal numbers, float64 [last - first, width]."""
        low, high = first - self.start, last - self.start
        noise = torch.empty(last - first, width, dtype=torch.float64)
        for block in range(low // BLOCK_ROWS, -(-high // BLOCK_ROWS)):
            generator = seeded_generator(f"{name}/new tokens/{block}", seed)
            drawn = torch.empty(BLOCK_ROWS, width).normal_(generator=generator)
            begin = block * BLOCK_ROWS
            start, stop = max(low, begin), min(high, begin + BLOCK_ROWS)
            noise[start - low : stop - low] = drawn[start - begin : stop - begin]
        return noise
