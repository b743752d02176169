"""`ilrec prepare`: a foreign format → the canonical folder (docs/data-formats.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, sha256_file
from ilrec_dist.common.manifest import write_manifest
from ilrec_dist.common.places import TakePlaces
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import FORMAT_VERSION
from ilrec_dist.data.dataset_writer import write_interactions, write_tables
from ilrec_dist.data.ingest.cluster import spread_batches
from ilrec_dist.data.ingest.encoder import Encoder
from ilrec_dist.data.ingest.spill import Core, Spill, k_core, sort_rows, spill_batches
from ilrec_dist.data.ingest.threads import ahead, ordered_map
from ilrec_dist.data.reading.source import Rejects, Source, load_format
from ilrec_dist.data.report import match_items, summary_line
from ilrec_dist.data.split import Cuts, find_cuts, split_positions

# Leave-one-out: one training item, the validation target, the test target.
MIN_LENGTH = 3


def input_files(config: DataConfig) -> list[Path]:
    """Files whose bytes decide whether `prepare` must run again.

    Raises UserError when one is missing.
    """
    return load_format(config.format).files(config)


def prepare(
    config: DataConfig, out: str | Path, spread: TakePlaces | None = None
) -> dict[str, Any]:
    """Read, sort, filter and write a data set to the folder `out`.

    Returns its manifest.

    Files: interactions.parquet has user int32, item int32 and, where the source has
    times, timestamp int64, sorted by (user, time, file order); users.parquet id and
    interactions; items.parquet id, title and text. Numbers follow the ids' order: by
    value where all ids are integers, else by string. sequences.npy int32 [T] and
    offsets.npy int64 [users + 1] hold the items again, to be mapped into memory;
    split_positions.npy a chronological split. manifest.json has the counts, `summary`
    in one line (which is printed too), and the SHA-256 of every input and output file.

    spread: where `data.path` is a folder of many files, they are parsed on the places
    that it takes of the Ray cluster that this process is connected to; the result is
    the same bytes. `out` is replaced
    as a whole. Raises UserError for unreadable input, item texts that fit no item,
    users too short for leave-one-out, or nothing left by the k-core.
    """
    format_ = load_format(config.format)
    files = format_.files(config)
    with committed_folder(out) as folder:
        if format_.generate is not None:
            counts = format_.generate(config, folder)
        else:
            assert format_.read is not None
            counts = _ingest(format_.read(config), config, folder, spread)
        manifest = {
            "version": FORMAT_VERSION,
            "format": config.format,
            "split": "leave-one-out",
            **counts,
            "inputs": {
                name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for name, path in _input_names(files).items()
            },
        }
        manifest = write_manifest(folder, manifest | {"summary": summary_line(manifest)})
    print_plain(manifest["summary"])
    return manifest


def _input_names(files: list[Path]) -> dict[str, Path]:
    """Input files by their path below the folder that they share.

    So a copy elsewhere gives the same manifest.
    """
    shared = os.path.commonpath([path.absolute().parent for path in files]) if files else ""
    return {path.absolute().relative_to(shared).as_posix(): path for path in files}


def _ingest(
    source: Source, config: DataConfig, folder: Path, spread: TakePlaces | None
) -> dict[str, Any]:
    """Write the files of a foreign data set; returns the manifest's counts."""
    rejects = Rejects(config.max_bad_rows)
    scratch = folder / "scratch"

    # Read: ids become codes, rows are spilled to disk.
    users, items = Encoder(), Encoder()
    read = Spill(scratch / "read", source.timed)
    if spread is not None and source.parts is not None and len(source.parts[0]) > 1:
        with spread(len(source.parts[0])) as places:
            batches = spread_batches(*source.parts, rejects, places)
            spill_batches(ahead(batches, check=places.check), read, users, items)
    else:
        spill_batches(ahead(source.batches(rejects)), read, users, items)
    total = read.rows
    if total == 0:
        raise UserError(f"{source.main_file}: no interactions")

    # Sort by user and time, and filter.
    (user_rank, user_ids), (item_rank, item_ids) = users.ranks(), items.ranks()
    rows = Spill(scratch / "sorted", source.timed)
    repeats = sort_rows(read, rows, user_rank, item_rank)
    min_user, min_item = config.min_user_interactions, config.min_item_interactions
    core = k_core(rows, len(user_ids), len(item_ids), min_user, min_item)
    _check_core(core, config, source)

    # Write.
    cuts = _cuts(config, rows, core, source)
    lengths, before = write_interactions(rows, core, folder, cuts)
    kept_users = user_ids.filter(pa.array(core.users)).cast(pa.string())
    split: dict[str, Any] = {}
    if cuts is None:
        _check_lengths(lengths, kept_users, source)
    else:
        positions, split["split"] = split_positions(lengths, before, cuts)
        np.save(folder / "split_positions.npy", positions)
    table, match = match_items(item_ids, core.items, source.item_table(), source)
    write_tables(folder, kept_users, lengths, table)
    shutil.rmtree(scratch)
    if rejects.rows:
        lines = (json.dumps(row, ensure_ascii=False) for row in rejects.rows)
        (folder / "rejects.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        **split,
        "users": len(kept_users),
        "items": table.num_rows,
        "interactions": core.rows,
        "timestamps": source.timestamp_unit() if source.timed else None,
        "read": {
            "users": len(user_ids),
            "items": len(item_ids),
            "interactions": total,
            "repeats_dropped": repeats,
            "bad_rows": len(rejects.rows),
            "users_without_interactions": rejects.users_without_interactions,
        },
        "k_core": {
            "min_user_interactions": min_user,
            "min_item_interactions": min_item,
            "rounds": core.rounds,
            "users_removed": len(user_ids) - len(kept_users),
            "items_removed": len(item_ids) - table.num_rows,
            "interactions_removed": total - repeats - core.rows,
        },
        "item_table": match,
        "notes": list(source.notes),
    }


def _check_core(core: Core, config: DataConfig, source: Source) -> None:
    users, items = int(core.users.sum()), int(core.items.sum())
    if users < 1 or items < 2:
        raise UserError(
            f"{source.main_file}: the k-core (data.min_user_interactions "
            f"{config.min_user_interactions}, data.min_item_interactions "
            f"{config.min_item_interactions}) leaves {users} users and {items} items, expected "
            f"at least 1 and 2; lower these settings or bring more data"
        )


def _check_lengths(lengths: np.ndarray, user_ids: pa.Array, source: Source) -> None:
    short = np.flatnonzero(lengths < MIN_LENGTH)
    if len(short):
        user = user_ids[int(short[0])].as_py()
        raise UserError(
            f"{source.main_file}: user {user!r} has {lengths[short[0]]} interactions, expected at "
            f"least {MIN_LENGTH} to split off a validation and a test item ({len(short)} such "
            f"users); set data.min_user_interactions to {MIN_LENGTH} or more to drop them"
        )


def _cuts(config: DataConfig, rows: Spill, core: Core, source: Source) -> Cuts | None:
    """Where a chronological split cuts; None for leave-one-out."""
    if config.split == "leave_one_out":
        return None
    if not rows.timed:
        raise UserError(
            f"{source.main_file}: data.split {config.split} needs times, and these interactions "
            f"have none; use leave_one_out"
        )

    def times() -> Iterator[np.ndarray]:
        for user, item, time in ordered_map(lambda range_: rows.read(*range_), rows.ranges()):
            assert time is not None
            yield time[core.users[user] & core.items[item]]

    return find_cuts(config, times, core.rows)
