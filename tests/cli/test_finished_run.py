"""A finished run: refused commands leave it, its hashes identify it, damage is repaired."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from ilrec_dist.cli.main import main

ITEMS = [str(number) for number in range(20)]


def write_shop(folder: Path, rename: dict[str, str], index_too: bool) -> None:
    """An LC-Rec data set of 20 items; `rename` maps some of their ids to others."""
    folder.mkdir(exist_ok=True)

    def named(item: str) -> str:
        return rename.get(item, item)

    sequences = {
        f"u{user}": [named(ITEMS[(user * 3 + step * (1 + user % 4)) % 20]) for step in range(8)]
        for user in range(40)
    }
    index = {
        named(item) if index_too else item: [f"<a_{int(item) % 5}>", f"<b_{int(item) // 5}>"]
        for item in ITEMS
    }
    titles = {named(item): {"title": f"Thing {item}"} for item in ITEMS}
    for kind, value in (("inter", sequences), ("item", titles), ("index", index)):
        (folder / f"shop.{kind}.json").write_text(json.dumps(value))


def config_of(root: Path) -> Path:
    tree = {
        "name": "shop",
        "runs_dir": str(root / "runs"),
        "data": {"format": "lcrec", "path": str(root / "shop"), "min_item_interactions": 1},
        "items": {"index": str(root / "shop/shop.index.json")},
        "cf": {"epochs": 1, "hidden_size": 16, "num_layers": 1},
        "backbone": {"num_layers": 2, "hidden_size": 16, "num_heads": 2},
        "train": {"methods": ["sft"], "epochs": 1, "batch_size": 40, "warmup": 0.1},
        "evaluation": {"beam": 10},
        "launch": {"engine": "torchrun", "threads": 1, "device": "cpu"},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(tree))
    return root / "c.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shop")
    write_shop(root / "shop", {}, index_too=True)
    assert main(["run", str(config_of(root))]) == 0
    return root


@pytest.fixture
def shop(finished, tmp_path) -> Path:
    """A copy of the finished run with its data, to be changed."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.copytree(finished / "shop", tmp_path / "shop")
    config_of(tmp_path)
    return tmp_path


def files(root: Path) -> dict[str, bytes]:
    folder = root / "runs/shop"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def recommend(root: Path) -> list[str]:
    histories = pa.table({"user": ["a"], "items": [["1", "2", "3"]]})
    pq.write_table(histories, root / "h.parquet")
    argv = ["recommend", root / "runs/shop", "--histories", root / "h.parquet"]
    assert main([*map(str, argv), "--out", str(root / "out.parquet")]) == 0
    return pq.read_table(root / "out.parquet").column("item").to_pylist()


def test_a_refused_run_leaves_a_finished_one_as_it_was(shop, capsys):
    before, answers = files(shop), recommend(shop)
    write_shop(shop / "shop", {"0": "500"}, index_too=False)
    (shop / "shop/shop.index.json").write_text(
        json.dumps({item: [f"<a_{int(item) % 5}>", f"<b_{int(item) // 5}>"] for item in ITEMS})
    )
    line = refused(capsys, "run", shop / "c.yaml")
    assert "shop.index.json" in line and "'500'" in line
    assert files(shop) == before and recommend(shop) == answers


def test_so_it_is_when_the_workers_refuse_after_other_stages_have_run(shop, capfd):
    before = files(shop)
    write_shop(shop / "shop", {"0": "500"}, index_too=True)
    assert main(["run", str(shop / "c.yaml"), "launch.device=cuda"]) == 2
    assert "launch.device" in capfd.readouterr().err.strip().splitlines()[-1]
    assert files(shop) == before
    assert main(["run", str(shop / "c.yaml")]) == 0
    after = files(shop)
    assert after["data/items.parquet"] != before["data/items.parquet"]
    assert not any(name.startswith(".previous") for name in after)


def test_what_was_trained_on_other_data_is_refused_wherever_it_is_used(shop, capsys):
    write_shop(shop / "shop", {"0": "500"}, index_too=False)
    assert main(["prepare", str(shop / "c.yaml")]) == 0
    run = shop / "runs/shop"
    pq.write_table(pa.table({"user": ["a"], "items": [["1", "2"]]}), shop / "h.parquet")
    (shop / "new.csv").write_text("item,title\n900,Thing 900\n")
    for argv in (
        ["recommend", run, "--histories", shop / "h.parquet"],
        ["export-data", run, "--format", "lcrec", "--out", shop / "Out"],
        ["index", "add", run, "--items", shop / "new.csv", "--out", shop / "longer"],
        ["evaluate", shop / "c.yaml"],
    ):
        line = refused(capsys, *argv)
        assert "prepare" in line or "another configuration or other input" in line
    assert not (shop / "Out").exists() and not (shop / "longer").exists()


def damage(path: Path, keep_time: bool = False) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    stamp = status.st_mtime_ns + (0 if keep_time else 1)
    os.utime(path, ns=(stamp, stamp))


def test_a_damaged_run_is_repaired_by_the_command_that_its_refusal_names(shop, capsys):
    run, before = shop / "runs/shop", files(shop)
    # Copies: what is loaded maps the file, which is damaged below.
    loaded = load_file(run / "train/sft-seed0/best.safetensors")
    weights = {key: tensor.clone() for key, tensor in loaded.items()}
    damage(run / "data/users.parquet")
    damage(run / "train/sft-seed0/best.safetensors")
    (run / "items/index.json").unlink()
    shutil.rmtree(run / "evaluation/popularity")
    (run / ".stages/cf.json").write_text((run / ".stages/cf.json").read_text()[:40])
    line = refused(capsys, "recommend", run, "--histories", shop / "h.parquet")
    assert "damaged" in line and "ilrec" in line
    assert main(["run", str(shop / "c.yaml")]) == 0
    assert capsys.readouterr().out.count("; made again") >= 4
    after = files(shop)
    for name in ("data/users.parquet", "items/index.json", "cf/full.safetensors"):
        assert after[name] == before[name]
    repaired = load_file(run / "train/sft-seed0/best.safetensors")
    assert all((repaired[key] == weights[key]).all() for key in weights)
    assert main(["run", str(shop / "c.yaml")]) == 0
    assert "made again" not in capsys.readouterr().out


def test_a_flipped_byte_that_left_the_time_is_found_with_verify(shop, capsys):
    users = shop / "runs/shop/data/users.parquet"
    whole = users.read_bytes()
    damage(users, keep_time=True)
    assert main(["prepare", str(shop / "c.yaml")]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main(["prepare", str(shop / "c.yaml"), "--verify"]) == 0
    assert "users.parquet is missing or not what was written" in capsys.readouterr().out
    assert users.read_bytes() == whole


@pytest.mark.parametrize(
    "name",
    [
        "data/manifest.json",
        "items/catalogue.json",
        "items/manifest.json",
        "items/trie.json",
        "train/sft-seed0/result.json",
    ],
)
def test_damage_in_what_describes_the_files_is_refused_by_name(shop, capsys, name):
    damage(shop / "runs/shop" / name, keep_time=True)
    line = refused(capsys, "recommend", shop / "runs/shop", "--histories", shop / "h.parquet")
    assert f"runs/shop/{name}: damaged" in line and "ilrec" in line


@pytest.mark.parametrize("name", ["prepare", "index", "train sft seed 0"])
def test_a_record_that_is_cut_off_is_refused_by_name(shop, capsys, name):
    record = shop / f"runs/shop/.stages/{name}.json"
    whole = record.read_text()
    for content in (whole[:40], whole.replace('"sha256"', '"sha257"', 1), "[]"):
        record.write_text(content)
        line = refused(capsys, "recommend", shop / "runs/shop", "--histories", shop / "h.parquet")
        assert f"{name}.json: damaged" in line and "--verify" in line


def test_the_advice_for_a_damaged_manifest_repairs_the_run(shop, capsys):
    answers = recommend(shop)
    for command, name in (("prepare", "data/manifest.json"), ("index", "items/manifest.json")):
        damage(shop / "runs/shop" / name)
        line = refused(capsys, "recommend", shop / "runs/shop", "--histories", shop / "h.parquet")
        assert name in line and "--verify" in line
        assert main([command, str(shop / "c.yaml"), "--verify"]) == 0
        assert recommend(shop) == answers


@pytest.mark.parametrize("name", ["cf/manifest.json", "data/manifest.json", "items/manifest.json"])
def test_a_stage_that_stands_on_a_damaged_manifest_does_not_begin(shop, capsys, name):
    damage(shop / "runs/shop" / name, keep_time=True)
    before = files(shop)
    line = refused(capsys, "run", shop / "c.yaml", "train.epochs=2")
    assert f"runs/shop/{name}: damaged" in line and "--verify" in line
    assert files(shop) == before


@pytest.mark.parametrize("name", ["cf/report.json", "items/report.json"])
def test_the_report_reads_no_damaged_file(shop, capsys, name):
    damage(shop / "runs/shop" / name, keep_time=True)
    line = refused(capsys, "evaluate", shop / "c.yaml")
    assert f"runs/shop/{name}: damaged" in line


def test_an_interrupted_command_leaves_what_it_replaced_and_the_old_settings_put_it_back(
    shop, monkeypatch, capsys
):
    before = files(shop)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ilrec_dist.pipeline.stages.index.build_catalogue", interrupt)
        argv = ["run", str(shop / "c.yaml"), "items.collisions=refuse", "data.max_bad_rows=1"]
        assert main(argv) == 130
    assert files(shop)["data/manifest.json"]
    capsys.readouterr()
    assert main(["run", str(shop / "c.yaml")]) == 0
    output = capsys.readouterr().out
    assert "put back" in output and output.count("unchanged") == 6
    after = files(shop)
    for name in before:
        if not name.startswith(("results", "report")):
            assert after[name] == before[name], name


def test_dropped_checkpoints_are_announced_with_the_setting_that_changed(shop, capfd):
    run = shop / "runs/shop"
    (run / ".stages/train sft seed 0.json").unlink()
    folder = run / "train/sft-seed0/checkpoints/step-00000003"
    folder.mkdir(parents=True)
    assert main(["train", str(shop / "c.yaml"), "train.epochs=2"]) == 0
    output = " ".join(capfd.readouterr().out.split())
    assert "checkpoints of its unfinished work are dropped" in output
    assert "train.epochs: 1 → 2" in output and not folder.exists()
