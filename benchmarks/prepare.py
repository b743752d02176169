"""How fast does `prepare` take in interactions, and in how much memory?

    python benchmarks/prepare.py [--quick] [--rows N] [--format parquet] [--json FILE]

Rows are drawn (10 a user, 100 an item, items by popularity, times in no order) and
written as Parquet, CSV, or Parquet whose ids are text; then `prepare` runs on the file
in a process of its own: read, k-core (5, 5), sort, split, write. Rate: rows of the file
per second of that run, hashing of the files included. The last two rows hold users and
items fixed (one hundredth and one thousandth of --rows) while the interactions grow
tenfold. The temporary folder (--folder; about 10 GB for 10⁸ rows) is deleted at the
end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from harness import (
    command_line,
    describe_machine,
    in_own_process,
    machine_line,
    peak_mib,
    write_figures,
)

from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.ingest.threads import ahead
from ilrec_dist.data.prepare import prepare

FORMATS = ("parquet", "csv", "text")
CHUNK = 2_000_000


def draw(rows: int, users: int, items: int, text: bool) -> Iterator[pa.Table]:
    """The interactions, a chunk at a time: user, item (int64, or text such as
    U00000017) and timestamp (seconds over three years).
    """
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        user, item = rng.integers(0, users, size), (items * rng.random(size) ** 2).astype(np.int64)
        columns = [pa.array(user), pa.array(item)]
        if text:
            columns = [
                pc.binary_join_element_wise(
                    letter, pc.utf8_lpad(column.cast(pa.string()), 8, "0"), ""
                )
                for letter, column in zip("UI", columns, strict=True)
            ]
        yield pa.table(
            [*columns, pa.array(1_500_000_000 + rng.integers(0, 94_608_000, size))],
            ["user", "item", "timestamp"],
        )


def write(path: Path, rows: int, users: int, items: int, form: str) -> None:
    tables = ahead(draw(rows, users, items, form == "text"))
    first = next(tables)
    if form == "csv":
        writer: Any = pacsv.CSVWriter(
            path, first.schema, write_options=pacsv.WriteOptions(quoting_style="none")
        )
    else:
        writer = pq.ParquetWriter(path, first.schema, compression="zstd", use_dictionary=False)
    with writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def measure(folder: Path, form: str, rows: int, users: int, items: int) -> dict[str, Any]:
    """Write the file, prepare it in another process, delete both.

    peak_gib is that process's; disk_gib the most that lay in `folder` at once.
    """
    path = folder / f"interactions.{'csv' if form == 'csv' else 'parquet'}"
    started = time.perf_counter()
    write(path, rows, users, items, form)
    drawn = time.perf_counter() - started
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            # `prepare` deletes what it is done with while this looks.
            with contextlib.suppress(FileNotFoundError):
                files = (file for file in folder.rglob("*") if file.is_file())
                most[0] = max(most[0], sum(file.stat().st_size for file in files))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        figures = in_own_process(__file__, "--prepare", str(path), str(folder / "out"))
    finally:
        done.set()
        watcher.join()
        path.unlink()
        shutil.rmtree(folder / "out", ignore_errors=True)
    return {
        "format": form,
        "rows": rows,
        "users": users,
        "items": items,
        "drawn_seconds": drawn,
        "disk_gib": most[0] / 2**30,
        **figures,
    }


def prepare_one(path: Path, out: Path) -> None:
    """In the process that is measured."""
    started = time.perf_counter()
    manifest = prepare(
        DataConfig(format="csv" if path.suffix == ".csv" else "parquet", path=str(path)), out
    )
    seconds = time.perf_counter() - started
    rate = manifest["read"]["interactions"] / seconds
    print(
        json.dumps(
            {
                "seconds": seconds,
                "rows_per_second": rate,
                "peak_gib": peak_mib() / 1024,
                "kept": manifest["interactions"],
                "k_core": manifest["k_core"],
            }
        )
    )


def main() -> None:
    parser = command_line(__doc__, "4 million rows, under 50 seconds on two free cores")
    parser.add_argument("--rows", type=int, help="interactions (default 10⁸)")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=FORMATS, help="which files (default: all)"
    )
    parser.add_argument(
        "--no-growth", action="store_true", help="leave out the two rows of fixed users and items"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the temporary folder is made (default: the system's)"
    )
    parser.add_argument("--prepare", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare_one(*arguments.prepare)
        return
    rows = arguments.rows or (4_000_000 if arguments.quick else 100_000_000)
    wanted = [(form, rows, rows // 10, rows // 100) for form in arguments.format]
    if not arguments.no_growth:
        wanted += [("parquet", size, rows // 100, rows // 1000) for size in (rows // 10, rows)]
    machine = describe_machine()
    print(machine_line(machine))
    print(
        f"{'file':>8} {'rows':>12} {'users':>11} {'items':>10} {'rows/s':>10} {'seconds':>8} "
        f"{'peak GiB':>9} {'disk GiB':>9}",
        flush=True,
    )
    measured = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="prepare-") as folder:
        for case in wanted:
            measured.append(row := measure(Path(folder), *case))
            print(
                f"{row['format']:>8} {row['rows']:>12,} {row['users']:>11,} {row['items']:>10,} "
                f"{row['rows_per_second']:>10,.0f} {row['seconds']:>8.1f} {row['peak_gib']:>9.2f} "
                f"{row['disk_gib']:>9.2f}",
                flush=True,
            )
    result: dict[str, Any] = {"machine": machine, "rows": measured}
    if not arguments.no_growth:
        result["peak_growth"] = measured[-1]["peak_gib"] / measured[-2]["peak_gib"]
        print(
            f"peak memory grows {result['peak_growth']:.2f} × from {measured[-2]['rows']:,} to "
            f"{measured[-1]['rows']:,} rows of the same users and items"
        )
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
