"""Vectors → code tuples by FAISS residual quantisation, and per-level centroids for codes that came from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilrec_dist.common.errors import UserError

AT_ONCE = 1 << 17  # vectors whose residuals are held
TRAIN_POINTS_PER_CODE = 256  # FAISS's own default for k-means; more points change little


@dataclass(frozen=True)
class Codebooks:
    """One centroid per code and level; a code that nothing is known of has NaNs."""

    levels: list[np.ndarray]  # float32 [codes of the level, d]

    def residual(self, vectors: np.ndarray, codes: np.ndarray, level: int) -> np.ndarray:
        """float32 [n, d]: what is left of the vectors after the codes of the levels before `level`."""
        rest = np.array(vectors, np.float32)
        for earlier in range(level):
            rest -= np.nan_to_num(self.levels[earlier][codes[:, earlier]])
        return rest


def residual_codes(
    vectors: np.ndarray, levels: int, codes_per_level: int, seed: int
) -> tuple[np.ndarray, Codebooks]:
    """(codes int32 [n, levels], codebooks) of float32 vectors [n, d]. Deterministic for one seed and thread count.

    Raises UserError unless codes_per_level is a power of two not above n.
    """
    import faiss

    n, dim = vectors.shape
    bits = codes_per_level.bit_length() - 1
    if 1 << bits != codes_per_level:
        raise UserError(
            f"items.codes_per_level: {codes_per_level} is not a power of two, which FAISS's residual quantiser needs; try {1 << bits}"
        )
    if codes_per_level > n:
        raise UserError(
            f"items.codes_per_level: {codes_per_level} codes for {n} items; use at most {1 << (n.bit_length() - 1)}"
        )
    quantiser = faiss.ResidualQuantizer(dim, levels, bits)
    quantiser.train_type = faiss.ResidualQuantizer.Train_default
    quantiser.max_beam_size = 1  # greedy, as `index add` assigns; FAISS's beam of 5 trains on its candidates' residuals too and ends with a larger error
    quantiser.cp.seed = seed + 1  # FAISS replaces a seed of 0 in places
    quantiser.cp.min_points_per_centroid = 1
    random = np.random.default_rng(seed)
    sample = vectors
    if n > TRAIN_POINTS_PER_CODE * codes_per_level:
        sample = vectors[
            np.sort(random.choice(n, TRAIN_POINTS_PER_CODE * codes_per_level, replace=False))
        ]
    quantiser.train(np.ascontiguousarray(sample))
    codes = np.empty((n, levels), np.int32)
    for start in range(0, n, AT_ONCE):
        packed = quantiser.compute_codes(np.ascontiguousarray(vectors[start : start + AT_ONCE]))
        codes[start : start + AT_ONCE] = faiss.unpack_bitstrings(packed, levels, bits)
    books = faiss.vector_to_array(quantiser.codebooks).reshape(levels, codes_per_level, dim)
    return codes, Codebooks(list(books))


def centroid_codebooks(vectors: np.ndarray, codes: np.ndarray, level_sizes: list[int]) -> Codebooks:
    """Codebooks for given codes: at each level the mean of the residuals of the items that carry the code."""
    books = Codebooks([])
    for level, size in enumerate(level_sizes):
        count = np.bincount(codes[:, level], minlength=size)
        sums = np.zeros((size, vectors.shape[1]), np.float32)
        for start in range(0, len(codes), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            np.add.at(sums, codes[some, level], books.residual(vectors[some], codes[some], level))
        with np.errstate(invalid="ignore", divide="ignore"):
            books.levels.append(sums / count[:, None].astype(np.float32))
    return books
