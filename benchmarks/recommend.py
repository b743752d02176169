"""Does `ilrec recommend` answer a million histories in the memory that 10⁵ take?

    python benchmarks/recommend.py [--quick] [--json FILE]

Trains a tiny decoder on generated data, then answers random histories of 1 to 8 items,
ten items each, in one process: 10⁵ and 10⁶ of them, each command in a process of its
own. The peak, the kernel's VmHWM, may grow by 100 MiB at most. The file of histories
has one row group, so that nothing of it helps to read it by parts. Users a second say
how little a million takes with such a model, and nothing of larger ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from harness import (
    command_line,
    describe_machine,
    in_own_process,
    machine_line,
    peak_mib,
    write_figures,
)

from ilrec_dist.cli.main import main as ilrec
from ilrec_dist.data.dataset import load_dataset

GROWTH_LIMIT_MIB = 100
SIZES, QUICK_SIZES = (100_000, 1_000_000), (40_000, 200_000)
LONGEST = 8
RUN = {
    "name": "tiny",
    "data": {"synthetic": {"users": 150, "items": 60, "categories": 5, "mean_length": 7.0}},
    "items": {"levels": 2, "codes_per_level": 8},
    "backbone": {"num_layers": 1, "hidden_size": 16, "num_heads": 1},
    "train": {
        "methods": ["sft"],
        "epochs": 1,
        "batch_size": 50,
        "warmup": 2,
        "max_history": 4,
        "validation_users": 10,
    },
    "evaluation": {"beam": 10, "batch_size": 512},
    "launch": {"engine": "torchrun", "threads": 1, "device": "cpu"},
}


def main() -> int:
    parser = command_line(__doc__, "40,000 and 200,000 histories")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return answer(*arguments.one)
    machine = describe_machine()
    print(machine_line(machine), flush=True)
    sizes = QUICK_SIZES if arguments.quick else SIZES
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = train(folder)
        ids = list(load_dataset(run / "data").item_ids)
        for size in sizes:
            write_histories(folder / "histories.parquet", ids, size)
            row = in_own_process(__file__, "--one", str(run), str(folder / "histories.parquet"))
            assert row["rows"] == 10 * size
            figures[size] = row
            print(
                f"{size:,} histories: peak {row['peak_mib']:.0f} MiB, {row['seconds']:.0f} s, "
                f"{size / row['seconds']:,.0f} users/s",
                flush=True,
            )
    growth = figures[sizes[1]]["peak_mib"] - figures[sizes[0]]["peak_mib"]
    print(f"the peak grows by {growth:.0f} MiB")
    write_figures(arguments.json, {"machine": machine, "histories": figures, "growth_mib": growth})
    return int(growth > GROWTH_LIMIT_MIB)


def train(folder: Path) -> Path:
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(RUN | {"runs_dir": str(folder / "runs")}))
    for stage in ("prepare", "index", "train"):
        assert ilrec([stage, str(config)]) == 0
    return folder / "runs/tiny"


def write_histories(path: Path, ids: list[str], count: int) -> None:
    rng = np.random.default_rng(0)
    stop = np.cumsum(rng.integers(1, LONGEST + 1, count))
    items = pa.array(ids).take(pa.array(rng.integers(0, len(ids), stop[-1])))
    offsets = pa.array(np.concatenate([[0], stop]), pa.int32())
    users = pa.array([f"user-{number}" for number in range(count)])
    table = pa.table({"user": users, "items": pa.ListArray.from_arrays(offsets, items)})
    pq.write_table(table, path, row_group_size=count)


def answer(run: str, histories: str) -> int:
    out = Path(histories).with_name("out.parquet")
    began = time.perf_counter()
    code = ilrec(["recommend", run, "--histories", histories, "--out", str(out)])
    result = {
        "peak_mib": peak_mib(),
        "seconds": time.perf_counter() - began,
        "rows": pq.read_metadata(out).num_rows,
    }
    print(json.dumps(result), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
