"""Writes the files of a prepared folder, which `data.dataset` reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.data.ingest.spill import Core, Rows, Spill
from ilrec_dist.data.ingest.threads import ordered_map
from ilrec_dist.data.split import Cuts

ROW_GROUP = 1_000_000


def write_tables(folder: Path, user_ids: pa.Array, lengths: np.ndarray, items: pa.Table) -> None:
    """Write users.parquet, items.parquet and offsets.npy.

    lengths: int64 [users] interactions of each. items: id, title, text.
    """
    users = pa.table({"id": user_ids, "interactions": pa.array(lengths, pa.int32())})
    pq.write_table(users, folder / "users.parquet", compression="zstd")
    pq.write_table(items, folder / "items.parquet", compression="zstd")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def write_interactions(
    rows: Spill, core: Core, folder: Path, cuts: Cuts | None
) -> tuple[np.ndarray, np.ndarray]:
    """Write the rows that the core keeps to interactions.parquet and sequences.npy.

    Users and items are numbered anew, in the order of their ranks. Returns each user's
    interactions, int64 [users], and those before each cut, int64 [2, users].
    """
    new_user = np.cumsum(core.users, dtype=np.int32) - 1
    new_item = np.cumsum(core.items, dtype=np.int32) - 1
    num_users = int(core.users.sum())
    lengths, before = np.zeros(num_users, np.int64), np.zeros((2, num_users), np.int64)
    fields = [("user", pa.int32()), ("item", pa.int32())]
    schema = pa.schema(fields + ([("timestamp", pa.int64())] if rows.timed else []))

    def kept(range_: tuple[int, int]) -> list[np.ndarray]:
        return _kept_rows(rows.read(*range_), core, new_user, new_item)

    with (
        pq.ParquetWriter(
            folder / "interactions.parquet",
            schema,
            compression="zstd",
            # Of sorted rows, deltas are smaller and three times as fast to write as dictionaries.
            use_dictionary=False,
            column_encoding=dict.fromkeys(schema.names, "DELTA_BINARY_PACKED"),
        ) as writer,
        open(folder / "sequences.npy", "wb") as sequences,
    ):
        header = {"descr": "<i4", "fortran_order": False, "shape": (core.rows,)}
        np.lib.format.write_array_header_1_0(sequences, header)
        for columns in ordered_map(kept, rows.ranges()):
            lengths += np.bincount(columns[0], minlength=num_users)
            for row, cut in enumerate((cuts.validation, cuts.test) if cuts else ()):
                before[row] += np.bincount(columns[0][columns[2] < cut], minlength=num_users)
            sequences.write(columns[1].data)
            arrays = [pa.array(column) for column in columns]
            table = pa.Table.from_arrays(arrays, schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP)
    return lengths, before


def _kept_rows(
    rows: Rows, core: Core, new_user: np.ndarray, new_item: np.ndarray
) -> list[np.ndarray]:
    user, item, time = rows
    alive = core.users[user] & core.items[item]
    columns = [new_user[user[alive]], new_item[item[alive]]]
    return columns if time is None else [*columns, time[alive]]
