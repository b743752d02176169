"""A finished run is evaluated again: only what is missing, damaged
or made with something else is ranked.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ilrec_dist.cli.main import main

pytestmark = pytest.mark.slow
COUNTED = {"popularity", "transitions"}
FUSED = {"sft+cf-seed0", "sft+cf+transitions-seed0"}


def evaluation(root: Path) -> dict[str, tuple[int, int]]:
    """The predictions of the run with what tells that they are the same files."""
    folder = root / "runs/shop/evaluation"
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*.parquet")
    }


def ranked_by(root: Path, *words: str) -> set[str]:
    """The rows that the command ranks."""
    before = evaluation(root)
    assert main(["run", str(root / "c.yaml"), *words]) == 0
    after = evaluation(root)
    return {Path(name).parent.name for name in after if after[name] != before.get(name)}


def rows(root: Path) -> list[dict]:
    found: list[dict] = json.loads((root / "runs/shop/results.json").read_text())["rows"]
    return found


def test_another_list_of_baselines_or_fusions_ranks_what_is_new(shop: Path) -> None:
    before = rows(shop)
    words = ["evaluation.baselines=[gru4rec,caser]"]
    assert ranked_by(shop, *words) == {"gru4rec", "caser"}
    assert [row for row in rows(shop) if row["method"] not in ("gru4rec", "caser")] == before
    assert ranked_by(shop, *words, "evaluation.fusion=false") == set()
    assert not {row["method"] for row in rows(shop)} & {"sft+cf", "sft+cf+transitions"}
    # Back again: the mixtures are made anew, of the same lists.
    assert ranked_by(shop) == FUSED and rows(shop) == before


def test_another_training_or_cf_model_ranks_what_reads_it(shop: Path) -> None:
    everything = {Path(name).parent.name for name in evaluation(shop)}
    words = ["cf.epochs=2"]
    # SFT's training reads no CF model.
    assert ranked_by(shop, *words) == FUSED | {"sasrec"}
    words.append("train.seeds=[0,1]")
    of_seed_1 = {name.replace("seed0", "seed1") for name in FUSED | {"sft-seed0"}}
    assert ranked_by(shop, *words) == of_seed_1
    words.append("train.learning_rate=0.003")
    assert ranked_by(shop, *words) == FUSED | {"sft-seed0"} | of_seed_1
    # What was kept is what is ranked from nothing.
    kept, folder = tables(shop), shop / "runs/shop/evaluation"
    assert {Path(name).parent.name for name in kept} == everything | of_seed_1
    shutil.rmtree(folder)
    assert ranked_by(shop, *words) == everything | of_seed_1
    assert tables(shop) == kept


def tables(root: Path) -> dict[str, object]:
    folder = root / "runs/shop/evaluation"
    return {name: pq.read_table(folder / name) for name in evaluation(root)}


def test_a_damaged_row_is_ranked_again_and_so_is_one_whose_weights_were_edited(
    shop: Path,
) -> None:
    folder, before = shop / "runs/shop/evaluation", tables(shop)
    weights = folder / "sft+cf-seed0/predictions.fusion.json"
    content, stamp = weights.read_text(), weights.stat().st_mtime_ns
    other = content.replace('"beam": 10', '"beam": 20')
    assert other != content and len(other) == len(content)
    weights.write_text(other)
    os.utime(weights, ns=(stamp, stamp))
    # Size and time do not tell.
    assert ranked_by(shop, "--verify") == {"sft+cf-seed0"}
    assert weights.read_text() == content and tables(shop) == before
    # A whole file of another row, in place of this one's.
    shutil.copyfile(
        folder / "transitions/predictions.parquet", folder / "popularity/predictions.parquet"
    )
    assert ranked_by(shop) == {"popularity"} and tables(shop) == before


def test_a_refused_command_leaves_the_evaluation_as_it_was(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, found = evaluation(shop), rows(shop)
    words = ["evaluation.baselines=[caser]", "launch.device=cuda"]
    assert main(["run", str(shop / "c.yaml"), *words]) == 2
    assert "launch.device" in capsys.readouterr().err
    assert evaluation(shop) == before and rows(shop) == found
    assert ranked_by(shop) == set()


def test_a_sample_of_test_users_is_the_same_for_every_row(shop: Path) -> None:
    everything, whole = {Path(name).parent.name for name in evaluation(shop)}, tables(shop)
    assert ranked_by(shop, "evaluation.users=13") == everything
    sample = tables(shop)
    users = next(iter(sample.values())).column("user").to_pylist()
    assert len(users) == 13 and users == sorted(set(users)) and users != list(range(13))
    for name, table in sample.items():
        assert table.column("user").to_pylist() == users, name
        if not name.startswith("sft"):
            # What ranks by scores gives a user the list that it gives among all.
            of_all = whole[name].filter(pc.is_in(whole[name].column("user"), pa.array(users)))
            assert table.column("items") == of_all.column("items"), name
    assert {row["users"] for row in rows(shop)} == {13}
