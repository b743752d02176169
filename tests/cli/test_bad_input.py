"""Bad input through the command line.

The exit code is 2, one line names what is wrong, and nothing is left half-written.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.common.manifest import with_checksum
from ilrec_dist.config.load import load_config
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.training import checkpoint

RNG = np.random.default_rng(1)
SEQUENCES = {f"u{u}": [f"i{i}" for i in RNG.choice(12, 8, replace=False)] for u in range(30)}
INDEX = {f"i{i}": [f"<a_{i % 3}>", f"<b_{i // 3}>"] for i in range(12)}


@pytest.fixture
def place(tmp_path) -> Path:
    folder = tmp_path / "toys"
    folder.mkdir()
    write(tmp_path, "inter", SEQUENCES)
    write(tmp_path, "index", INDEX)
    (tmp_path / "c.yaml").write_text(
        f"name: t\nruns_dir: {tmp_path}/runs\ndata: {{format: lcrec, path: {folder}}}\n"
        f"items: {{index: {folder}/toys.index.json}}\n"
    )
    return tmp_path


def write(place: Path, kind: str, value) -> Path:
    path = place / "toys" / f"toys.{kind}.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def refused(capsys, *argv) -> str:
    """Run a command that must fail with one line on stderr and exit code 2; returns the
    line.
    """
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ilrec: error: ")
    return lines[0]


def files(place: Path) -> dict[str, bytes]:
    """Every file of the run's folder with its content."""
    return {
        str(path.relative_to(place / "runs/t")): path.read_bytes()
        for path in (place / "runs/t").rglob("*")
        if path.is_file()
    }


def test_a_missing_file(place, capsys):
    shutil.rmtree(place / "toys")
    assert "toys" in refused(capsys, "run", place / "c.yaml")
    assert not (place / "runs").exists()


def test_malformed_json_names_the_position(place, capsys):
    path = write(place, "inter", '{"u0": ["i1", "i2",\n "i3" "i4"]}')
    message = refused(capsys, "prepare", place / "c.yaml")
    assert str(path) in message and "line 2, column 7" in message
    assert not (place / "runs/t").exists()


def test_an_item_without_a_code(place, capsys):
    write(place, "index", {item: code for item, code in INDEX.items() if item != "i7"})
    assert main(["prepare", str(place / "c.yaml")]) == 0
    before = files(place)
    message = refused(capsys, "index", place / "c.yaml")
    assert "toys.index.json" in message and "'i7'" in message
    assert files(place) == before


def test_a_duplicate_code_where_the_rule_forbids_it(place, capsys):
    write(place, "index", INDEX | {"i5": INDEX["i4"]})
    assert main(["prepare", str(place / "c.yaml")]) == 0
    before = files(place)
    message = refused(capsys, "index", place / "c.yaml", "items.collisions=refuse")
    assert "toys.index.json" in message and "i4" in message and "i5" in message
    assert files(place) == before
    assert main(["index", str(place / "c.yaml"), "items.collisions=keep"]) == 0


def test_users_too_short_to_split(place, capsys):
    path = write(place, "inter", SEQUENCES | {"short": ["i1", "i2"]})
    message = refused(
        capsys,
        "prepare",
        place / "c.yaml",
        "data.min_user_interactions=1",
        "data.min_item_interactions=1",
    )
    assert str(path) in message and "'short'" in message and "2" in message
    assert not (place / "runs/t").exists()


def test_a_finished_stage_survives_input_that_is_refused(place, capsys):
    assert main(["prepare", str(place / "c.yaml")]) == main(["index", str(place / "c.yaml")]) == 0
    before = files(place)
    for kind, value in (("inter", '{"u0": ["i1",'), ("index", INDEX | {"i5": INDEX["i4"]})):
        good = (place / "toys" / f"toys.{kind}.json").read_text()
        write(place, kind, value)
        refused(
            capsys,
            "prepare" if kind == "inter" else "index",
            place / "c.yaml",
            "items.collisions=refuse",
        )
        assert files(place) == before
        write(place, kind, good)
    # The command is refused for its value; the folder is still resumable.
    assert main(["run", str(place / "c.yaml"), "--resume", "train.epochs=0"]) == 2
    capsys.readouterr()
    assert (
        main(["index", str(place / "c.yaml")]) == 0
        and "unchanged, not run again" in capsys.readouterr().out
    )


def test_a_killed_attempt_leaves_a_stage_that_runs_again(place, capsys):
    assert main(["prepare", str(place / "c.yaml")]) == 0
    (place / "runs/t/.stages/prepare.begun.json").write_text(
        json.dumps({"fingerprint": "of other settings"})
    )
    assert "stage prepare has not been made" in refused(capsys, "index", place / "c.yaml")
    assert (
        main(["prepare", str(place / "c.yaml")]) == 0 and "unchanged" not in capsys.readouterr().out
    )


def test_one_command_at_a_time_works_in_a_folder(place, capsys):
    with open_run(load_config(place / "c.yaml")).alone():
        assert "another ilrec command is at work" in refused(capsys, "prepare", place / "c.yaml")
    assert main(["prepare", str(place / "c.yaml")]) == 0


def test_a_folder_that_cannot_be(place, capsys):
    message = refused(capsys, "prepare", place / "c.yaml", f"runs_dir={place}/c.yaml")
    assert "c.yaml/t" in message and "runs_dir" in message


@pytest.mark.parametrize(
    "argv",
    [
        ["prepare", "c.yaml", "--nonsense"],
        ["prepair", "c.yaml"],
        ["prepare"],
        [],
        ["recommend", "runs/t", "--histories", "h.parquet", "--top", "many"],
        ["recommend", "runs/t"],
    ],
)
def test_a_mistyped_command_is_one_line(argv, capsys):
    assert "--help" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["launch.workers=3", "launch.tp=2"], ["launch.workers", "3", "tp 2"]),
        (["launch.workers=2", "launch.tp=2", "backbone.num_heads=1"], ["launch.tp", "heads"]),
        (
            ["launch.workers=2", "launch.tp=2", "backbone.vocab_multiple=5"],
            ["launch.tp", "vocabulary"],
        ),
        (["train.epoch=1"], ["train.epoch", "train.epochs"]),
    ],
)
def test_impossible_settings(place, capsys, overrides, parts):
    message = refused(capsys, "run", place / "c.yaml", *overrides)
    assert all(part in message for part in parts)
    assert not (place / "runs").exists()


def test_a_run_folder_of_another_configuration(place, capsys):
    assert main(["prepare", str(place / "c.yaml")]) == 0
    assert "another configuration" in refused(
        capsys, "run", place / "c.yaml", "--resume", "data.min_user_interactions=6"
    )
    assert "stage prepare was made by another configuration" in refused(
        capsys, "index", place / "c.yaml", "data.min_user_interactions=6"
    )


def test_a_damaged_checkpoint_with_no_earlier_one(place, capsys):
    config = load_config(place / "c.yaml", ["train.methods=[sft]"])
    assert main(["prepare", str(place / "c.yaml")]) == main(["index", str(place / "c.yaml")]) == 0
    folder = place / "runs/t/train/sft-seed0/checkpoints/step-00000003"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"not what was written")
    fingerprint = open_run(config).fingerprint("train sft seed 0")
    manifest = {"format": checkpoint.FORMAT, "step": 3, "fingerprint": fingerprint, "state": {}}
    manifest["sha256"] = {"state.pt": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    (place / "runs/t/.stages/train sft seed 0.begun.json").write_text(
        json.dumps({"fingerprint": fingerprint})
    )
    message = refused(
        capsys, "train", place / "c.yaml", "train.methods=[sft]", "launch.engine=torchrun"
    )
    assert str(folder / "state.pt") in message and "no earlier checkpoint" in message
    assert folder.exists()


def test_recommend_refuses_a_folder_without_a_trained_model(place, capsys):
    message = refused(
        capsys, "recommend", place / "runs/t", "--histories", place / "histories.parquet"
    )
    assert "not a run folder" in message
    assert main(["prepare", str(place / "c.yaml")]) == 0
    assert "no such weights" in refused(
        capsys, "recommend", place / "runs/t", "--histories", place / "histories.parquet"
    )


@pytest.mark.parametrize(
    "command",
    ["prepare", "index", "cf", "train", "evaluate", "recommend", "run", "export-data", "config"],
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  ilrec {command} " in text
