"""Ids → dense integer codes, a column at a time, in hash tables that are each small enough for the processor's cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.data.threads import cores

PARTS = 256  # 10⁷ ids: 40,000 a part
TAIL = 4  # bytes of a string's end that choose its part


class Encoder:
    """Ids (strings or integers) → int32 codes. An id's part follows from its last bytes, its code from its part and when it was first met there.

    One table of 10⁷ ids costs a cache miss a row; 256 small ones do not, and can be worked on by as many threads as there are cores. Ids that
    all end alike share one part: slower, and no different otherwise.
    """

    def __init__(self) -> None:
        self.parts: list[pa.Array | None] = [None] * PARTS
        self.pool = ThreadPoolExecutor(cores(), thread_name_prefix="encode")

    def __len__(self) -> int:
        return sum(0 if part is None else len(part) for part in self.parts)

    def encode(self, column: pa.Array) -> np.ndarray:
        """int32 codes of a column without nulls, [len(column)]; not dense: `ranks` numbers them."""
        if pa.types.is_string(column.type):
            column = column.cast(pa.large_string())  # 2³¹ bytes of ids are reached with 10⁸ users
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
            encoded = (piece if known is None else pa.concat_arrays([known, piece])).dictionary_encode()  # the known ids come first: they keep their codes
            local = encoded.indices.to_numpy(zero_copy_only=False)[0 if known is None else len(known) :]
            codes[order[bounds[number] : bounds[number + 1]]] = local * PARTS + number
            self.parts[number] = encoded.dictionary

        list(self.pool.map(encode_part, np.flatnonzero(np.diff(bounds)).tolist()))
        return codes

    def ranks(self) -> tuple[np.ndarray, pa.Array]:
        """(int32 rank of every code, ids as strings in rank order): by value where all ids are plain integers, else by string."""
        parts = [(number, part) for number, part in enumerate(self.parts) if part is not None]
        if not parts:
            return np.zeros(0, np.int32), pa.array([], pa.large_string())
        values = pa.concat_arrays([part for _, part in parts])
        codes = np.concatenate([np.arange(len(part)) * PARTS + number for number, part in parts])
        order = pc.sort_indices(_sortable(values))
        rank = np.full(codes.max() + 1, -1, np.int32)
        rank[codes[order.to_numpy()]] = np.arange(len(order), dtype=np.int32)
        return rank, values.take(order).cast(pa.large_string())


def _parts(column: pa.Array) -> np.ndarray:
    """uint8 part of every id: a function of its value (integers) or of its last bytes (strings)."""
    if pa.types.is_integer(column.type):
        return _mixed(column.to_numpy(zero_copy_only=False).astype(np.uint64))
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64, len(column) + 1, column.offset * 8)
    content = np.frombuffer(data, np.uint8)
    key = np.zeros(len(column), np.uint64)
    for back in range(1, TAIL + 1):
        place = ends[1:] - back
        byte = content[np.maximum(place, 0)]
        byte[place < ends[:-1]] = 0  # shorter than that
        key = key << np.uint64(8) | byte
    return _mixed(key)


def _mixed(key: np.ndarray) -> np.ndarray:
    return (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(56)).astype(np.uint8)  # the golden ratio spreads neighbours; 8 bits: PARTS


def _sortable(values: pa.Array) -> pa.Array:
    if pa.types.is_integer(values.type):
        return values
    plain = pc.match_substring_regex(values, r"^(0|[1-9][0-9]{0,17})$")
    return values.cast(pa.int64()) if pc.all(plain).as_py() else values
