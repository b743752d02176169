"""A shop of 20 items, a tiny run on it, and what is done to the run's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ilrec_dist.cli.main import main

ITEMS = [str(number) for number in range(20)]


def codes_of(item: str) -> list[str]:
    """Codes that are distinct, and leave some free after each first one."""
    return [f"<a_{int(item) % 5}>", f"<b_{int(item) // 5 * 2}>"]


def write_shop(folder: Path, rename: dict[str, str], index_too: bool) -> None:
    """An LC-Rec data set of 20 items; `rename` maps some of their ids to others."""
    folder.mkdir(exist_ok=True)

    def named(item: str) -> str:
        return rename.get(item, item)

    sequences = {
        f"u{user}": [named(ITEMS[(user * 3 + step * (1 + user % 4)) % 20]) for step in range(8)]
        for user in range(40)
    }
    index = {named(item) if index_too else item: codes_of(item) for item in ITEMS}
    titles = {named(item): {"title": f"Thing {item}"} for item in ITEMS}
    for kind, value in (("inter", sequences), ("item", titles), ("index", index)):
        (folder / f"shop.{kind}.json").write_text(json.dumps(value))


def config_of(root: Path) -> Path:
    """Write and name the configuration of a run on the shop in `root`."""
    tree = {
        "name": "shop",
        "runs_dir": str(root / "runs"),
        "data": {"format": "lcrec", "path": str(root / "shop"), "min_item_interactions": 1},
        "items": {"index": str(root / "shop/shop.index.json")},
        "cf": {"epochs": 1, "hidden_size": 16, "num_layers": 1},
        # Of Llama's form, which `ilrec export` needs.
        "backbone": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "normalization": "RMSNorm",
            "activation": "swiglu",
            "position_embedding": "rope",
            "bias": False,
        },
        "train": {"methods": ["sft"], "epochs": 1, "batch_size": 40, "warmup": 0.1},
        "evaluation": {"beam": 10, "fusion": True},
        "launch": {"engine": "torchrun", "threads": 1, "device": "cpu"},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(tree))
    return root / "c.yaml"


def files(root: Path) -> dict[str, bytes]:
    """Path → content of every file of the run."""
    folder = root / "runs/shop"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def write_history(root: Path) -> Path:
    """A file with the history of one user."""
    histories = pa.table({"user": ["a"], "items": [["1", "2", "3"]]})
    pq.write_table(histories, root / "h.parquet")
    return root / "h.parquet"


def recommend(root: Path) -> list[str]:
    """The items that the run recommends to one user."""
    argv = ["recommend", root / "runs/shop", "--histories", write_history(root)]
    assert main([*map(str, argv), "--out", str(root / "out.parquet")]) == 0
    return pq.read_table(root / "out.parquet").column("item").to_pylist()


def damage(path: Path, keep_time: bool = False) -> None:
    """Flip a bit in the middle of a file."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    stamp = status.st_mtime_ns + (0 if keep_time else 1)
    os.utime(path, ns=(stamp, stamp))
