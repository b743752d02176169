"""`ilrec index`, `index build`, `index add` and `index report` through the command
line.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.common.errors import UserError
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("index-cli")
    (root / "c.yaml").write_text(
        f"name: t\nruns_dir: {root}\ndata: {{synthetic: {{users: 40, items: 60, categories: 4}}}}\n"
        "items: {levels: 2, codes_per_level: 16, embedding_dim: 8, collisions: resolve}\n"
    )
    assert main(["prepare", str(root / "c.yaml")]) == 0
    assert main(["index", "build", str(root / "c.yaml")]) == 0
    return root


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ilrec: error: ")
    return line


def test_build_is_the_stage_and_shows_its_report(place, capsys):
    before = (place / "t/items/index.json").read_bytes()
    assert main(["index", "build", str(place / "c.yaml")]) == 0
    shown = capsys.readouterr().out
    assert (
        "index: unchanged" in shown
        and "60 items, 33 tokens" in shown
        and "collisions after        0 items" in shown
    )
    assert "resolved by reassigning the last level" in shown
    assert (
        main(["index", str(place / "c.yaml"), "items.seed=0"]) == 0
        and "index: unchanged" in capsys.readouterr().out
    )
    assert (place / "t/items/index.json").read_bytes() == before
    assert "no such configuration file" in refused(capsys, "index", "build", place / "gone.yaml")


def test_add_keeps_old_codes_and_names_a_full_prefix(place, capsys, tmp_path):
    # The new items read like the first two.
    known = pq.read_table(place / "t/data/items.parquet").slice(0, 2).to_pydict()
    pq.write_table(
        pa.table({"item": ["n1", "n2"], "title": known["title"], "text": known["text"]}),
        tmp_path / "new.parquet",
    )
    assert (
        main(
            [
                "index",
                "add",
                str(place / "t"),
                "--items",
                str(tmp_path / "new.parquet"),
                "--out",
                str(tmp_path / "more"),
            ]
        )
        == 0
    )
    assert "2 items added, no old code changed" in capsys.readouterr().out
    old, new = Catalogue.load(place / "t/items").codes(), Catalogue.load(tmp_path / "more").codes()
    assert (
        (new[60:, 0] == old[:2, 0]).all()
        and (new[:60] == old).all()
        and len(np.unique(new, axis=0)) == len(new) == 62
    )
    assert "exists already" in refused(
        capsys,
        "index",
        "add",
        place / "t",
        "--items",
        tmp_path / "new.parquet",
        "--out",
        tmp_path / "more",
    )
    (tmp_path / "crowd.csv").write_text(
        "item,title\n" + "".join(f"n{n},Oak table\n" for n in range(40))
    )
    message = refused(
        capsys,
        "index",
        "add",
        place / "t",
        "--items",
        tmp_path / "crowd.csv",
        "--out",
        tmp_path / "crowd",
    )
    assert (
        "has no code left at its last level (16 codes, 40 new items" in message
        and not (tmp_path / "crowd").exists()
    )


def test_add_refuses_what_it_cannot_use(place, capsys, tmp_path):
    (tmp_path / "new.csv").write_text("item,title\nn1,Oak table\n")
    out = ["--out", tmp_path / "out"]
    assert "gone.csv: no such file (--items)" in refused(
        capsys, "index", "add", place / "t", "--items", tmp_path / "gone.csv", *out
    )
    assert "not a run folder with an index" in refused(
        capsys, "index", "add", tmp_path, "--items", tmp_path / "new.csv", *out
    )
    (tmp_path / "untitled.csv").write_text("item,name\nn1,Oak table\n")
    assert "no column 'title' (--items)" in refused(
        capsys, "index", "add", place / "t", "--items", tmp_path / "untitled.csv", *out
    )
    (tmp_path / "nameless.csv").write_text("item,title\nn1,Oak table\n,Elm table\n")
    assert "nameless.csv: line 3: no item id; mend it" in refused(
        capsys, "index", "add", place / "t", "--items", tmp_path / "nameless.csv", *out
    )
    pq.write_table(
        pa.table({"item": [None, "n1"], "title": ["Elm table", "Oak table"]}),
        tmp_path / "nameless.parquet",
    )
    assert "nameless.parquet: row 1: no item id" in refused(
        capsys, "index", "add", place / "t", "--items", tmp_path / "nameless.parquet", *out
    )
    np.save(tmp_path / "few.npy", np.zeros((3, 4)))
    assert "3 and 3 vectors for 60 old and 1 new items" in refused(
        capsys,
        "index",
        "add",
        place / "t",
        "--items",
        tmp_path / "new.csv",
        *out,
        "--vectors",
        tmp_path / "few.npy",
        tmp_path / "few.npy",
    )
    assert "new.csv: not a readable .npy file (--vectors)" in refused(
        capsys,
        "index",
        "add",
        place / "t",
        "--items",
        tmp_path / "new.csv",
        *out,
        "--vectors",
        tmp_path / "new.csv",
        tmp_path / "few.npy",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (np.zeros((1, 5)), "new.npy: vectors of 5 dimensions, those of .*old.npy have 4"),
        (np.array([[0, np.nan, 0, 0]]), "new.npy: row 1: a value that is NaN, infinite"),
        (np.array([[0, 1e39, 0, 0]]), "new.npy: row 1: .* beyond 32-bit floats"),
        (np.array([["a", "b", "c", "d"]]), "new.npy: expected numbers, found <U1"),
    ],
)
def test_vectors_that_cannot_be_compared_are_named(place, capsys, tmp_path, new, message):
    (tmp_path / "new.csv").write_text("item,title\nn1,Oak table\n")
    old = np.random.default_rng(0).normal(size=(60, 4))
    np.save(tmp_path / "old.npy", old)
    np.save(tmp_path / "new.npy", new)
    add = [
        "index",
        "add",
        place / "t",
        "--items",
        tmp_path / "new.csv",
        "--out",
        tmp_path / "out",
        "--vectors",
        tmp_path / "old.npy",
        tmp_path / "new.npy",
    ]
    assert re.search(message, refused(capsys, *add))
    old[7, 0] = np.inf
    np.save(tmp_path / "old.npy", old)
    assert "old.npy: row 8: a value that is NaN, infinite" in refused(capsys, *add)
    assert not (tmp_path / "out").exists()


def test_add_makes_the_folders_above_its_own(place, capsys, tmp_path):
    (tmp_path / "new.csv").write_text("item,title\ni1,Oak table\n")
    add = [
        "index",
        "add",
        str(place / "t"),
        "--items",
        str(tmp_path / "new.csv"),
        "--out",
        str(tmp_path / "a/b/out"),
    ]
    (tmp_path / "crowd.csv").write_text(
        "item,title\n" + "".join(f"n{n},Oak table\n" for n in range(40))
    )
    refused(capsys, *add[:4], tmp_path / "crowd.csv", *add[5:])
    assert not (tmp_path / "a").exists()
    assert main(add) == 0 and Catalogue.load(tmp_path / "a/b/out").num_items == 61
    (tmp_path / "file").write_text("")
    assert "file is a file, expected a folder (--out" in refused(
        capsys, *add[:6], tmp_path / "file/out"
    )


@pytest.mark.parametrize(
    "name",
    ["report.json", "catalogue.json", "trie.npy", "tokens.npy", "item_tokens.npy", "codebooks.npy"],
)
def test_a_damaged_file_of_the_index_is_named(place, capsys, tmp_path, name):
    shutil.copytree(place / "t", tmp_path / "t")
    (tmp_path / "new.csv").write_text("item,title\nn1,Oak table\n")
    add = ["add", tmp_path / "t", "--items", tmp_path / "new.csv", "--out", tmp_path / "out"]
    file = tmp_path / "t/items" / name
    whole = file.read_bytes()
    place_of_damage = whole.index(b"60") if name.endswith("json") else -1
    changed = bytearray(whole)
    changed[place_of_damage] ^= 1
    for content in (changed, whole[:-1], None):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        for command in [add, ["report", tmp_path / "t"]]:
            if command[0] == "report" and name in ("codebooks.npy", "trie.npy"):
                continue
            if name == "trie.npy":
                with pytest.raises(UserError, match="trie.npy: (damaged|missing)"):
                    Trie.load(tmp_path / "t/items", Catalogue.load(tmp_path / "t/items"))
            else:
                line = refused(capsys, "index", *command)
                assert name in line or "not a run folder" in line or "neither a run" in line
    assert not (tmp_path / "out").exists()


def test_report_of_a_run_a_folder_and_a_file(place, capsys, tmp_path):
    tables = []
    for index in (place / "t", place / "t/items"):
        assert main(["index", "report", str(index), "--plot", str(tmp_path / "use.svg")]) == 0
        tables.append(capsys.readouterr().out)
        assert (tmp_path / "use.svg").read_text().startswith("<svg")
    assert tables[0] == tables[1]
    file = tmp_path / "x.index.json"
    file.write_text(
        json.dumps({"p": ["<a_0>", "<b_1>"], "q": ["<a_0>", "<b_1>"], "r": ["<a_2>", "<b_0>"]})
    )
    assert main(["index", "report", str(file)]) == 0
    shown = capsys.readouterr().out
    assert (
        f"3 items, 6 tokens with padding, from {file}" in shown
        and "2 items (66.67%) share 1 tuples, largest group 2" in shown
    )
    assert "neither a run folder with an index" in refused(capsys, "index", "report", tmp_path)
    assert "is a folder; name the file" in refused(
        capsys, "index", "report", place / "t", "--plot", tmp_path
    )
    assert "the folder" in refused(
        capsys, "index", "report", place / "t", "--plot", tmp_path / "gone/use.svg"
    )


def test_each_has_help_with_an_example(capsys):
    for command in (["index"], ["index", "build"], ["index", "add"], ["index", "report"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0 and f"  ilrec {' '.join(command)} " in capsys.readouterr().out
