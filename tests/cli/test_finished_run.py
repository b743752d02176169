"""A finished run: refused commands leave it, its hashes identify it, damage is
repaired.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.config.load import dump_config, load_config
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.shop import (
    ITEMS,
    codes_of,
    damage,
    files,
    recommend,
    refused,
    write_history,
    write_shop,
)

pytestmark = pytest.mark.slow


def test_a_refused_run_leaves_a_finished_one_as_it_was(shop, capsys):
    before, answers = files(shop), recommend(shop)
    write_shop(shop / "shop", {"0": "500"}, index_too=False)
    (shop / "shop/shop.index.json").write_text(json.dumps({item: codes_of(item) for item in ITEMS}))
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


def test_opening_a_model_leaves_no_thread_behind(shop):
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    # The first command starts what stays for the process.
    recommend(shop)
    before = threads()
    recommend(shop)
    assert threads() == before


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


def test_a_damaged_run_is_repaired_by_the_command_that_its_refusal_names(shop, capsys):
    run, before = shop / "runs/shop", files(shop)
    weights = whole_weights(run / "train/sft-seed0/best")
    damage(run / "data/users.parquet")
    damage(run / "train/sft-seed0/best/model-00001-of-00001.safetensors")
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
    repaired = whole_weights(run / "train/sft-seed0/best")
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
    line = refused(capsys, "recommend", shop / "runs/shop", "--histories", write_history(shop))
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
    assert "is replaced" not in output
    # The training is finished now, and other settings do not replace it in silence either.
    assert main(["train", str(shop / "c.yaml"), "train.epochs=1"]) == 0
    (line,) = (line for line in capfd.readouterr().out.splitlines() if "warning" in line)
    assert line.startswith("warning: train sft seed 0: what it had trained is replaced")
    assert "(train.epochs: 2 → 1)" in line and "--resume refuses" in line


def test_a_changed_record_is_refused_by_name_and_the_advice_repairs_it(shop, capsys):
    record, answers = shop / "runs/shop/.stages/prepare.json", recommend(shop)
    digest = json.loads(record.read_text())["files"]["users.parquet"]["sha256"]
    changed = record.read_text().replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1"))
    record.write_text(changed)
    line = refused(capsys, "recommend", shop / "runs/shop", "--histories", shop / "h.parquet")
    assert "prepare.json: damaged" in line and "ilrec run CONFIG --verify" in line
    before = files(shop)
    assert main(["run", str(shop / "c.yaml"), "--verify"]) == 0
    assert recommend(shop) == answers
    # Nothing that stands on the data was made again.
    name = "train/sft-seed0/result.json"
    assert files(shop)[name] == before[name]


def test_a_changed_configuration_is_refused_and_written_again(shop, capsys):
    config, answers = shop / "runs/shop/config.yaml", recommend(shop)
    config.write_text(dump_config(load_config(shop / "c.yaml")))
    whole = config.read_text()
    assert main(["prepare", str(shop / "c.yaml")]) == 0
    config.write_text(whole.replace("beam: 10", "beam: 12"))
    line = refused(capsys, "recommend", shop / "runs/shop", "--histories", shop / "h.parquet")
    assert "runs/shop/config.yaml: damaged or edited" in line and "`ilrec run CONFIG`" in line
    assert main(["run", str(shop / "c.yaml")]) == 0
    assert config.read_text() == whole and recommend(shop) == answers
    # Where the change is meant, the file itself is the configuration.
    config.write_text(whole.replace("batch_size: 64", "batch_size: 32"))
    assert main(["run", str(config)]) == 0
    assert "batch_size: 32" in config.read_text() and recommend(shop) == answers


def test_damaged_curves_are_refused_and_the_report_does_without_them(shop, capsys):
    metrics = shop / "runs/shop/train/sft-seed0/metrics.jsonl"
    damage(metrics, keep_time=True)
    line = refused(capsys, "evaluate", shop / "c.yaml")
    assert f"{metrics}: damaged" in line and "delete it" in line
    metrics.unlink()
    assert main(["evaluate", str(shop / "c.yaml")]) == 0
    rows = json.loads((shop / "runs/shop/results.json").read_text())["rows"]
    assert not any("training_flops" in row for row in rows)


@pytest.mark.parametrize("setting", ["train.batch_size=40", "train.batch_size=20"])
def test_a_refusal_leaves_the_checkpoints_of_an_unfinished_training(shop, capfd, setting):
    """Both where the command would go on from them, and where it would begin anew."""
    settings = ["train.methods=[sft, ilrec]", "objective.crr_lambda=0"]
    run = shop / "runs/shop"
    step = run / "train/ilrec-seed0/checkpoints/step-00000003"
    step.mkdir(parents=True)
    (step / "state.pt").write_bytes(b"of the unfinished training")
    fingerprint = open_run(load_config(shop / "c.yaml", settings)).fingerprint("train ilrec seed 0")
    state = {"step": 3, "fingerprint": fingerprint, "state": {}, "sha256": {"state.pt": "0" * 64}}
    (step / "manifest.json").write_text(json.dumps(state))
    (run / ".stages/train ilrec seed 0.begun.json").write_text(
        json.dumps({"fingerprint": fingerprint})
    )
    before = files(shop)
    argv = ["run", str(shop / "c.yaml"), *settings, setting, "launch.device=cuda"]
    assert main(argv) == 2
    assert files(shop) == before


def test_a_late_refusal_leaves_a_new_training_beside_the_finished_ones(shop, capfd):
    damage(shop / "runs/shop/cf/full.safetensors", keep_time=True)
    damaged = files(shop)
    # The baselines read the CF model after all trainings.
    assert main(["run", str(shop / "c.yaml"), "train.seeds=[0, 1]"]) == 2
    assert "full.safetensors: damaged" in capfd.readouterr().err.strip().splitlines()[-1]
    after = files(shop)
    new = {name for name in after if name not in damaged}
    assert {name: after[name] for name in damaged} == damaged
    assert "train/sft-seed1/best/model-00001-of-00001.safetensors" in new
    assert all(name.startswith(("train/sft-seed1/", ".stages/train sft seed 1.")) for name in new)
    # The next command finds it finished.
    state = open_run(load_config(shop / "c.yaml", ["train.seeds=[0, 1]"]))
    name = "train sft seed 1"
    begun = state.begun(name)
    assert begun is not None and begun["fingerprint"] == state.fingerprint(name)
    assert "train/sft-seed1/result.json" in new
