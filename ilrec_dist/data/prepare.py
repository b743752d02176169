"""`ilrec prepare`: a foreign format → the canonical folder: interactions.parquet, users.parquet, items.parquet, manifest.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, sha256_file, write_json
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import FORMAT_VERSION
from ilrec_dist.data.formats.amazon import amazon_files, read_amazon
from ilrec_dist.data.formats.lcrec import lcrec_files, read_lcrec
from ilrec_dist.data.formats.minionerec import minionerec_files, read_minionerec
from ilrec_dist.data.formats.movielens import movielens_files, read_movielens
from ilrec_dist.data.formats.recbole import read_recbole, recbole_files
from ilrec_dist.data.formats.sequences import read_sequences, sequences_files
from ilrec_dist.data.formats.source import Rejects, Source
from ilrec_dist.data.formats.tables import read_csv, read_parquet, table_files
from ilrec_dist.data.ingest.cluster import spread_batches
from ilrec_dist.data.ingest.encoder import Encoder
from ilrec_dist.data.ingest.spill import Core, Rows, Spill, k_core, sort_rows, spill_batches
from ilrec_dist.data.ingest.threads import ahead, ordered_map
from ilrec_dist.data.split import Cuts, find_cuts, places
from ilrec_dist.data.synthetic.generate import (
    GENERATOR_VERSION,
    draw_histories,
    draw_model,
    item_table,
)

READERS: dict[str, Callable[[DataConfig], Source]] = {
    "lcrec": read_lcrec,
    "csv": read_csv,
    "parquet": read_parquet,
    "recbole": read_recbole,
    "amazon": read_amazon,
    "movielens": read_movielens,
    "sequences": read_sequences,
    "minionerec": read_minionerec,
}
INPUT_FILES: dict[str, Callable[[DataConfig], list[Path]]] = {
    "lcrec": lcrec_files,
    "csv": table_files,
    "parquet": table_files,
    "recbole": recbole_files,
    "amazon": amazon_files,
    "movielens": movielens_files,
    "sequences": sequences_files,
    "minionerec": minionerec_files,
}
ROW_GROUP = 1_000_000
MIN_LENGTH = 3  # one training item, the validation target, the test target


def input_files(config: DataConfig) -> list[Path]:
    """Files whose bytes decide whether the stage must run again; raises UserError when one is missing."""
    return [] if config.format == "synthetic" else INPUT_FILES[config.format](config)


def prepare(config: DataConfig, out: str | Path, spread: bool = False) -> dict[str, Any]:
    """Read, sort, filter and write a data set to the folder `out`; returns its manifest.

    interactions.parquet: user int32, item int32 and, where the source has times, timestamp int64, sorted by (user, time, file order).
    users.parquet: id, interactions. items.parquet: id, title, text. Indices follow the ids' order: by value where all are integers, else by string.
    sequences.npy int32 [T] and offsets.npy int64 [U + 1]: the items again, to be mapped into memory. places.npy: of a chronological split (`split.places`).
    spread: where `data.path` is a folder of many files, the Ray cluster that this process is connected to parses them; the result is the same bytes.
    Raises UserError for unreadable input, users too short for leave-one-out, or nothing left by the k-core. `out` is replaced as a whole.
    """
    files = input_files(config)
    with committed_folder(out) as folder:
        counts = (
            _generate(config, folder)
            if config.format == "synthetic"
            else _ingest(config, folder, spread)
        )
        names = sorted(path.name for path in folder.iterdir())
        manifest = {
            "version": FORMAT_VERSION,
            "format": config.format,
            "split": "leave-one-out",
            **counts,
            "inputs": {
                name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for name, path in _names(files).items()
            },
            "files": {
                name: {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": sha256_file(folder / name),
                }
                for name in names
            },
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def _names(files: list[Path]) -> dict[str, Path]:
    """Input files by their path below the folder they share, so that a copy elsewhere gives the same manifest."""
    shared = os.path.commonpath([path.absolute().parent for path in files]) if files else ""
    return {path.absolute().relative_to(shared).as_posix(): path for path in files}


def _ingest(config: DataConfig, folder: Path, spread: bool) -> dict[str, Any]:
    """Write the three tables of a foreign data set; returns the manifest's counts."""
    source = READERS[config.format](config)
    rejects = Rejects(config.max_bad_rows)
    scratch = folder / "scratch"
    users, items = Encoder(), Encoder()
    read = Spill(scratch / "read", source.timed)
    many = spread and source.parts is not None and len(source.parts[0]) > 1
    batches = (
        spread_batches(*source.parts, rejects) if many and source.parts else source.batches(rejects)
    )
    spill_batches(ahead(batches), read, users, items)
    total = read.rows
    if total == 0:
        raise UserError(f"{source.main_file}: no interactions")
    (user_rank, user_ids), (item_rank, item_ids) = users.ranks(), items.ranks()
    rows = Spill(scratch / "sorted", source.timed)
    repeats = sort_rows(read, rows, user_rank, item_rank)
    core = k_core(
        rows,
        len(user_ids),
        len(item_ids),
        config.min_user_interactions,
        config.min_item_interactions,
    )
    _check_core(core, config, source)
    cuts = _cuts(config, rows, core, source)
    lengths, before = _write_interactions(rows, core, folder, cuts)
    kept_users, kept_items = (
        user_ids.filter(pa.array(core.users)),
        item_ids.filter(pa.array(core.items)),
    )
    split: dict[str, Any] = {}
    if cuts is None:
        _check_lengths(lengths, kept_users, source)
    else:
        found, split["split"] = places(lengths, before, cuts)
        np.save(folder / "split_positions.npy", found)
    _write_tables(
        folder, kept_users.cast(pa.string()), lengths, _item_table(kept_items, source.item_table())
    )
    shutil.rmtree(scratch)
    if rejects.rows:
        lines = (json.dumps(row, ensure_ascii=False) for row in rejects.rows)
        (folder / "rejects.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return split | {
        "users": len(kept_users),
        "items": len(kept_items),
        "interactions": core.rows,
        "timestamps": source.timestamp_unit if source.timed else None,
        "read": {
            "users": len(user_ids),
            "items": len(item_ids),
            "interactions": total,
            "repeats_dropped": repeats,
            "bad_rows": len(rejects.rows),
        },
        "k_core": {
            "min_user_interactions": config.min_user_interactions,
            "min_item_interactions": config.min_item_interactions,
            "rounds": core.rounds,
            "users_removed": len(user_ids) - len(kept_users),
            "items_removed": len(item_ids) - len(kept_items),
            "interactions_removed": total - repeats - core.rows,
        },
    }


def _generate(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Write the generated shop. It is not filtered: an item that nobody took stays in, for the true model knows it."""
    if config.split != "leave_one_out":
        raise UserError(
            f"data.split {config.split}: the generated data have no times; leave it at leave_one_out"
        )
    model = draw_model(config.synthetic)
    items, offsets = draw_histories(model, config.synthetic)
    lengths = np.diff(offsets)
    users = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    pq.write_table(
        pa.table({"user": users, "item": items}),
        folder / "interactions.parquet",
        compression="zstd",
        row_group_size=ROW_GROUP,
    )
    np.save(folder / "sequences.npy", items)
    _write_tables(
        folder,
        pa.array([str(user) for user in range(len(lengths))]),
        lengths,
        item_table(model, config.synthetic),
    )
    model.save(folder / "true_model.npz")
    return {
        "users": len(lengths),
        "items": len(model.popularity),
        "interactions": len(items),
        "timestamps": None,
        "generator": {"version": GENERATOR_VERSION, **config_to_dict(config.synthetic)},
    }


def _write_tables(folder: Path, user_ids: pa.Array, lengths: np.ndarray, items: pa.Table) -> None:
    pq.write_table(
        pa.table({"id": user_ids, "interactions": pa.array(lengths, pa.int32())}),
        folder / "users.parquet",
        compression="zstd",
    )
    pq.write_table(items, folder / "items.parquet", compression="zstd")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def _check_core(core: Core, config: DataConfig, source: Source) -> None:
    users, items = int(core.users.sum()), int(core.items.sum())
    if users < 1 or items < 2:
        raise UserError(
            f"{source.main_file}: the k-core (data.min_user_interactions {config.min_user_interactions}, data.min_item_interactions "
            f"{config.min_item_interactions}) leaves {users} users and {items} items, expected at least 1 and 2; lower these settings or bring more data"
        )


def _check_lengths(lengths: np.ndarray, user_ids: pa.Array, source: Source) -> None:
    short = np.flatnonzero(lengths < MIN_LENGTH)
    if len(short):
        raise UserError(
            f"{source.main_file}: user {user_ids[int(short[0])].as_py()!r} has {lengths[short[0]]} interactions, expected at least {MIN_LENGTH} to split off a "
            f"validation and a test item ({len(short)} such users); set data.min_user_interactions to {MIN_LENGTH} or more to drop them"
        )


def _cuts(config: DataConfig, rows: Spill, core: Core, source: Source) -> Cuts | None:
    """Where a chronological split cuts; None for leave-one-out."""
    if config.split == "leave_one_out":
        return None
    if not rows.timed:
        raise UserError(
            f"{source.main_file}: data.split {config.split} needs times, and these interactions have none; use leave_one_out"
        )

    def times() -> Iterator[np.ndarray]:
        for user, item, time in ordered_map(lambda range_: rows.read(*range_), rows.ranges()):
            yield time[core.users[user] & core.items[item]]  # type: ignore[index]

    return find_cuts(config, times, core.rows)


def _write_interactions(
    rows: Spill, core: Core, folder: Path, cuts: Cuts | None
) -> tuple[np.ndarray, np.ndarray]:
    """Write the surviving rows under their final indices; returns every surviving user's interactions, int64 [U], and those before each cut, [2, U]."""
    new_user, new_item = (
        np.cumsum(core.users, dtype=np.int32) - 1,
        np.cumsum(core.items, dtype=np.int32) - 1,
    )
    lengths, before = (
        np.zeros(int(core.users.sum()), np.int64),
        np.zeros((2, int(core.users.sum())), np.int64),
    )
    schema = pa.schema(
        [
            ("user", pa.int32()),
            ("item", pa.int32()),
            *([("timestamp", pa.int64())] if rows.timed else []),
        ]
    )
    encoding = dict.fromkeys(
        schema.names, "DELTA_BINARY_PACKED"
    )  # smaller and three times as fast to write as dictionaries of sorted rows
    with (
        pq.ParquetWriter(
            folder / "interactions.parquet",
            schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding=encoding,
        ) as writer,
        open(folder / "sequences.npy", "wb") as sequences,
    ):
        np.lib.format.write_array_header_1_0(
            sequences, {"descr": "<i4", "fortran_order": False, "shape": (core.rows,)}
        )
        for columns in ordered_map(
            lambda range_: _surviving(rows.read(*range_), core, new_user, new_item), rows.ranges()
        ):
            lengths += np.bincount(columns[0], minlength=len(lengths))
            for row, cut in enumerate((cuts.validation, cuts.test) if cuts else ()):
                before[row] += np.bincount(columns[0][columns[2] < cut], minlength=len(lengths))
            sequences.write(columns[1].data)
            writer.write_table(
                pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema),
                row_group_size=ROW_GROUP,
            )
    return lengths, before


def _surviving(
    rows: Rows, core: Core, new_user: np.ndarray, new_item: np.ndarray
) -> list[np.ndarray]:
    user, item, time = rows
    alive = core.users[user] & core.items[item]
    return [
        new_user[user[alive]],
        new_item[item[alive]],
        *([time[alive]] if time is not None else []),
    ]


def _item_table(item_ids: pa.Array, table: pa.Table | None) -> pa.Table:
    """(id, title, text) in index order; null where the item table has no row or no text."""
    ids = item_ids.cast(pa.string())
    if table is None:
        nothing = pa.nulls(len(ids), pa.string())
        return pa.table({"id": ids, "title": nothing, "text": nothing})
    table = table.combine_chunks()
    where = pc.index_in(ids, value_set=table.column("id").combine_chunks().cast(pa.string()))
    return pa.table(
        {
            "id": ids,
            **{name: table.column(name).take(where).combine_chunks() for name in ("title", "text")},
        }
    )
