"""Vectors → code tuples by FAISS residual quantisation; centroids for codes that were
given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError

# Vectors whose residuals are in memory at once.
CHUNK_ROWS = 1 << 17
# Training vectors per code: FAISS's own default for k-means; more change little.
TRAIN_POINTS_PER_CODE = 256
# The codebooks' file lies beside the catalogue's.
CODEBOOKS = "codebooks.npy"


@dataclass(frozen=True)
class Codebooks:
    """One centroid per code and level; a code without a known centroid has NaNs."""

    levels: list[np.ndarray]  # float32 [codes of the level, d]

    @property
    def dim(self) -> int:
        return int(self.levels[0].shape[1])

    def residual(self, vectors: np.ndarray, codes: np.ndarray, level: int) -> np.ndarray:
        """float32 [n, d]: what is left of the vectors after the codes of the levels
        before.
        """
        residual = np.array(vectors, np.float32)
        for earlier in range(level):
            residual -= np.nan_to_num(self.levels[earlier][codes[:, earlier]])
        return residual

    def save(self, folder: Path) -> None:
        """Write CODEBOOKS: the levels' centroids one after another, float32
        [codes, d].
        """
        np.save(folder / CODEBOOKS, np.vstack(self.levels))

    @staticmethod
    def load(path: Path, level_sizes: tuple[int, ...]) -> Codebooks:
        """Read what `save` wrote. A level behind those that were quantised has NaNs."""
        stored = np.load(path)
        stops = np.cumsum(level_sizes)
        levels = []
        for stop, size in zip(stops, level_sizes, strict=True):
            levels.append(
                stored[stop - size : stop]
                if stop <= len(stored)
                else np.full((size, stored.shape[1]), np.nan, np.float32)
            )
        return Codebooks(levels)


def residual_codes(
    vectors: np.ndarray, levels: int, codes_per_level: int, seed: int
) -> tuple[np.ndarray, Codebooks]:
    """(codes int32 [n, levels], codebooks) of float32 vectors [n, d].

    Deterministic for one seed and thread count. Raises UserError unless codes_per_level
    is a power of two not above n.
    """
    # FAISS takes a second to load, and most commands never quantise.
    import faiss

    n, dim = vectors.shape
    bits = codes_per_level.bit_length() - 1
    if 1 << bits != codes_per_level:
        raise UserError(
            f"items.codes_per_level: {codes_per_level} is not a power of two, which FAISS's "
            f"residual quantiser needs; try {1 << bits}"
        )
    if codes_per_level > n:
        raise UserError(
            f"items.codes_per_level: {codes_per_level} codes for {n} items; "
            f"use at most {1 << (n.bit_length() - 1)}"
        )
    quantiser = faiss.ResidualQuantizer(dim, levels, bits)
    quantiser.train_type = faiss.ResidualQuantizer.Train_default
    # Greedy, as `index add` assigns. FAISS's beam of 5 trains on its candidates' residuals too and
    # ends with a larger error.
    quantiser.max_beam_size = 1
    # FAISS replaces a seed of 0 in places.
    quantiser.cp.seed = seed + 1
    quantiser.cp.min_points_per_centroid = 1
    random = np.random.default_rng(seed)
    sample = vectors
    if n > TRAIN_POINTS_PER_CODE * codes_per_level:
        chosen = random.choice(n, TRAIN_POINTS_PER_CODE * codes_per_level, replace=False)
        sample = vectors[np.sort(chosen)]
    quantiser.train(np.ascontiguousarray(sample))
    codes = np.empty((n, levels), np.int32)
    for start in range(0, n, CHUNK_ROWS):
        packed = quantiser.compute_codes(np.ascontiguousarray(vectors[start : start + CHUNK_ROWS]))
        codes[start : start + CHUNK_ROWS] = faiss.unpack_bitstrings(packed, levels, bits)
    books = faiss.vector_to_array(quantiser.codebooks).reshape(levels, codes_per_level, dim)
    return codes, Codebooks(list(books))


def centroid_codebooks(vectors: np.ndarray, codes: np.ndarray, level_sizes: list[int]) -> Codebooks:
    """Codebooks for given codes: per code the mean residual of the items
    that carry it.
    """
    books = Codebooks([])
    for level, size in enumerate(level_sizes):
        count = np.bincount(codes[:, level], minlength=size)
        sums = np.zeros((size, vectors.shape[1]), np.float32)
        for start in range(0, len(codes), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            np.add.at(sums, codes[rows, level], books.residual(vectors[rows], codes[rows], level))
        with np.errstate(invalid="ignore", divide="ignore"):
            books.levels.append(sums / count[:, None].astype(np.float32))
    return books
