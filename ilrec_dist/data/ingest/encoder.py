"""Ids → dense integer codes, a column at a time.

The hash tables are each small enough for the processor's cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.ingest.threads import cores

# Hash tables. Of 10⁷ ids each has 40,000.
PARTS = 256
# Ids of one part that have an int32 code.
PART_IDS = 2**31 // PARTS
# 2⁶⁴ over the golden ratio: multiplied by it, neighbours come to lie far apart.
GOLDEN = 0x9E3779B97F4A7C15


class Encoder:
    """Ids (strings or integers) → int32 codes.

    An id's part follows from a hash of all its bytes, its code from its part and from
    when it was first met there. One table of 10⁷ ids costs a cache miss a row; 256
    small ones do not, and can be worked on by as many threads as there are cores.
    """

    def __init__(self) -> None:
        self.parts: list[pa.Array | None] = [None] * PARTS
        self.pool = ThreadPoolExecutor(cores(), thread_name_prefix="encode")

    def __len__(self) -> int:
        return sum(0 if part is None else len(part) for part in self.parts)

    def encode(self, column: pa.Array) -> np.ndarray:
        """int32 codes of a column without nulls, [len(column)].

        They are not dense: `ranks` numbers them. Raises UserError when there are too
        many for int32.
        """
        if pa.types.is_string(column.type):
            # 10⁸ users have more than the 2³¹ bytes of ids that a string array holds.
            column = column.cast(pa.large_string())
        if len(column) == 0:
            return np.zeros(0, np.int32)
        part = _parts(column)
        order = np.argsort(part, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=PARTS))])
        column = column.take(pa.array(order))
        codes = np.empty(len(column), np.int32)

        def encode_part(number: int) -> None:
            piece = column.slice(bounds[number], bounds[number + 1] - bounds[number])
            known = self.parts[number]
            # The known ids come first, so they keep their codes.
            ids = piece if known is None else pa.concat_arrays([known, piece])
            encoded = ids.dictionary_encode()
            if len(encoded.dictionary) > PART_IDS:
                raise UserError(
                    f"more than {len(self):,} distinct users or items, and {PARTS * PART_IDS:,} "
                    f"is the most that can be numbered; split the data"
                )
            local = encoded.indices.to_numpy(zero_copy_only=False)[
                0 if known is None else len(known) :
            ]
            codes[order[bounds[number] : bounds[number + 1]]] = local * PARTS + number
            self.parts[number] = encoded.dictionary

        list(self.pool.map(encode_part, np.flatnonzero(np.diff(bounds)).tolist()))
        return codes

    def ranks(self) -> tuple[np.ndarray, pa.Array]:
        """(int32 rank of every code, ids as strings in rank order).

        The order is by value where all ids are plain integers, else by string.
        """
        parts = [(number, part) for number, part in enumerate(self.parts) if part is not None]
        if not parts:
            return np.zeros(0, np.int32), pa.array([], pa.large_string())
        values = pa.concat_arrays([part for _, part in parts])
        codes = np.concatenate([np.arange(len(part)) * PARTS + number for number, part in parts])
        order = _order(values)
        rank = np.full(codes.max() + 1, -1, np.int32)
        rank[codes[order.to_numpy()]] = np.arange(len(order), dtype=np.int32)
        return rank, values.take(order).cast(pa.large_string())


def _parts(column: pa.Array) -> np.ndarray:
    """uint8 part of every id, from its value (integers) or from all its bytes
    (strings).
    """
    if pa.types.is_integer(column.type):
        return _mixed(column.to_numpy(zero_copy_only=False).astype(np.uint64))
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(column) + 1, column.offset * 8)
    lengths, stops = np.diff(bounds), bounds[1:] - bounds[0]
    # Eight zeros stand before the first id.
    padded = np.zeros(int(stops[-1]) + 8, np.uint8)
    padded[8:] = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    # words[i]: the 8 bytes before byte i of the ids.
    words: np.ndarray = np.ndarray(len(padded) - 7, "<u8", padded.data, strides=(1,))
    key = lengths.astype(np.uint64)
    # The ids that have bytes left to add, 8 at a time from the end.
    rows: np.ndarray | slice = slice(None)
    factor, back = 1, 0
    longest = int(lengths.max())
    while back < longest:
        # Bits of the word that belong to the id before.
        foreign = np.maximum(back + 8 - lengths[rows], 0) * 8
        factor = factor * GOLDEN % 2**64
        key[rows] += (words[stops[rows] - back] >> foreign.astype(np.uint64)) * np.uint64(factor)
        back += 8
        rows = (
            np.flatnonzero(lengths > back)
            if isinstance(rows, slice)
            else rows[lengths[rows] > back]
        )
    return _mixed(key ^ key >> np.uint64(32))


def _mixed(key: np.ndarray) -> np.ndarray:
    # The upper 8 bits are one of PARTS numbers.
    return (key * np.uint64(GOLDEN) >> np.uint64(56)).astype(np.uint8)


def _order(values: pa.Array) -> pa.Array:
    if (
        pa.types.is_integer(values.type)
        or not pc.all(pc.match_substring_regex(values, r"^(0|[1-9][0-9]*)$")).as_py()
    ):
        return pc.sort_indices(values)
    digits = pc.binary_length(values)
    if pc.max(digits).as_py() <= 18:
        return pc.sort_indices(values.cast(pa.int64()))
    # Beyond int64, integers are in order of their number of digits, then as strings.
    by_value = [("digits", "ascending"), ("id", "ascending")]
    return pc.sort_indices(pa.table({"digits": digits, "id": values}), by_value)
