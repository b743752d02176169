"""Which predictions of an evaluation a changed
setting or a changed file makes invalid.
"""

from __future__ import annotations

import dataclasses
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.common.config_fields import Affects, config_to_dict
from ilrec_dist.common.files import write_json
from ilrec_dist.common.manifest import MANIFEST, with_checksum
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.load import apply_override, config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.pipeline import made_with, rankings
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.made_with import WEIGHTS_MADE_WITH, keep_valid
from ilrec_dist.pipeline.stages.evaluate import weights_file
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import tiny_config

COUNTED = {"popularity", "transitions", "bayes"}
SEQUENCE_MODELS = {"gru4rec", "caser"}
BASELINES = COUNTED | SEQUENCE_MODELS | {"sasrec"}
SFT, ILREC = {"sft-seed0", "sft-seed1"}, {"ilrec-seed0", "ilrec-seed1"}


def fused(rows: set[str]) -> set[str]:
    return {
        f"{method}{mixed}-{seed}"
        for method, seed in (row.split("-") for row in rows)
        for mixed in ("+cf", "+cf+transitions")
    }


TRAINED = SFT | ILREC | fused(SFT | ILREC)
EVERYTHING = BASELINES | TRAINED
# Of SFT the CF model has no part in the training, but in the mixtures.
OF_CF = {"sasrec"} | ILREC | fused(SFT | ILREC)

# Every key of the evaluation, and of each other set of stages that some keys affect one or
# two → (the rows that are ranked again, rows that are gone).
CHANGES: dict[str, tuple[set[str], set[str]]] = {
    "evaluation.beam=11": (TRAINED, set()),
    "evaluation.exclude_seen=false": (EVERYTHING, set()),
    "evaluation.users=100": (EVERYTHING, set()),
    "evaluation.batch_size=7": (set(), set()),
    "evaluation.fusion=false": (set(), fused(SFT | ILREC)),
    "evaluation.fusion_candidates=9": (fused(SFT | ILREC), set()),
    "evaluation.baselines=[gru4rec]": (set(), {"caser"}),
    "evaluation.baselines=[caser, gru4rec]": (set(), set()),
    "evaluation.examples=1": (set(), set()),
    "data.synthetic.users=151": (EVERYTHING, set()),
    "data.both_directions=true": (TRAINED | SEQUENCE_MODELS | {"sasrec"}, set()),
    "items.codes_per_level=16": (TRAINED, set()),
    "items.seed=3": (TRAINED, set()),
    "cf.epochs=3": (OF_CF | SEQUENCE_MODELS, set()),
    "cf.num_layers=2": (OF_CF, set()),
    "cf.reward_index=flat": (ILREC | fused(ILREC), set()),
    "cf.reward_cache=true": (set(), set()),
    "backbone.dropout=0.2": (TRAINED, set()),
    # Windows of training and histories of the evaluation.
    "train.max_history=7": (TRAINED, set()),
    "train.users=30": (TRAINED, set()),
    # They choose the weights of the model and of the mixtures.
    "train.validation_users=17": (TRAINED, set()),
    "train.seeds=[0]": (set(), {row for row in TRAINED if row.endswith("seed1")}),
    "train.methods=[sft]": (set(), ILREC | fused(ILREC)),
    "train.tracker=mlflow": (set(), set()),
    # SFT reads the scope of the softmax, and nothing else of these.
    "objective.softmax_scope=valid_next": (TRAINED, set()),
    "objective.crr_lambda=0.7": (ILREC | fused(ILREC), set()),
    "objective.workspace_mib=9": (set(), set()),
    "launch.workers=2": (set(), set()),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run of which there is what says what it is: the manifests."""
    config = tiny_config(
        tmp_path,
        train={"methods": ["sft", "ilrec"], "seeds": [0, 1]},
        evaluation={"fusion": True, "baselines": sorted(SEQUENCE_MODELS)},
    )
    for folder in made_folders(config):
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(folder.name)
    return config


def made_folders(config: Config) -> list[Path]:
    folders = RunArtifacts(config).folders
    trainings = [folders.training(method, seed) for method in ("sft", "ilrec") for seed in (0, 1)]
    models = [folders.baseline(name) for name in SEQUENCE_MODELS]
    best = [training / BEST for training in trainings]
    return [folders.data, folders.items, folders.cf, *models, *best]


def kept(tree: dict, write: bool = False) -> dict[Path, str]:
    """As an evaluation begins; with `write` all that it makes is then there."""
    config = config_from_dict(tree)
    before = open_run(config).fingerprints_before("evaluate")
    wanted = keep_valid(config, RunArtifacts(config), before)
    if write:
        for path, text in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, text)
            if "+" in path.parent.name:
                write_json(
                    weights_file(path), with_checksum({WEIGHTS_MADE_WITH: text, "weights": {}})
                )
    return wanted


def save(path: Path, text: str) -> None:
    one = np.ones(1, np.int64)
    items = np.ones((1, 1), np.int32)
    Predictions(one, one, items, items.astype(np.float32), one, one, True).save(path, text)


def kept_after(mesh: Mesh, trees: list[dict]) -> list[dict[Path, str]]:
    return [kept(tree, write=number == 0) for number, tree in enumerate(trees)]


def rows_of(paths: typing.Iterable[Path]) -> set[str]:
    return {path.parent.name for path in paths}


def changed(config: Config, change: str) -> dict:
    tree = config_to_dict(config)
    apply_override(tree, change)
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_leaves_the_rows_that_it_has_no_part_in(
    config: Config, change: str
) -> None:
    again, gone = CHANGES[change]
    trees = [config_to_dict(config), changed(config, change)]
    before, after = run_distributed(kept_after, 1, 1, trees)[0]
    assert rows_of(before) == EVERYTHING and rows_of(before) - rows_of(after) == gone
    folder, staying = RunArtifacts(config).folders.evaluation, EVERYTHING - again - gone
    # Both treatments of each row.
    left = Counter(path.parent.name for path in folder.rglob("*.parquet"))
    assert left == dict.fromkeys(staying, 2)
    assert rows_of(folder.rglob("*.json")) == {row for row in staying if "+" in row}


@pytest.mark.slow
def test_a_changed_file_leaves_the_rows_that_do_not_read_it(config: Config) -> None:
    folders = RunArtifacts(config).folders
    tree = config_to_dict(config)
    for folder, again in (
        (folders.data, EVERYTHING),
        (folders.items, TRAINED),
        (folders.cf, {"sasrec"} | fused(SFT | ILREC)),
        (folders.baseline("caser"), {"caser"}),
        (folders.training("sft", 1) / BEST, {"sft-seed1"} | fused({"sft-seed1"})),
    ):
        run_distributed(kept_after, 1, 1, [tree])
        (folder / MANIFEST).write_text("other")
        run_distributed(begin, 1, 1, tree)
        assert rows_of(folders.evaluation.rglob("*.parquet")) == EVERYTHING - again, folder


def begin(mesh: Mesh, tree: dict) -> None:
    kept(tree)


def begin_of_another_format(mesh: Mesh, tree: dict) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_with, "FORMAT", made_with.FORMAT + 1)
        kept(tree)


@pytest.mark.slow
def test_code_that_ranks_otherwise_keeps_nothing(config: Config) -> None:
    tree = config_to_dict(config)
    run_distributed(kept_after, 1, 1, [tree])
    run_distributed(begin_of_another_format, 1, 1, tree)
    assert not list(RunArtifacts(config).folders.evaluation.iterdir())


@pytest.mark.slow
def test_what_is_no_part_of_the_evaluation_goes(config: Config) -> None:
    tree, folder = config_to_dict(config), RunArtifacts(config).folders.evaluation
    (wanted,) = run_distributed(kept_after, 1, 1, [tree])[0]
    path = folder / "sft-seed0/predictions.parquet"
    mixture = folder / "sft+cf-seed0/predictions.parquet"
    # Parts, of this model and of another one, and one that was half written.
    parts = rankings.parts_folder(path)
    parts.mkdir()
    save(parts / "000000.parquet", wanted[path])
    save(parts / "000001.parquet", wanted[mixture])
    (parts / ".000002.parquet.writing-12").touch()
    path.unlink()
    # Predictions of a version that did not say what they were made with, and weights of a hand.
    save(folder / "popularity/predictions.parquet", "")
    weights = weights_file(mixture)
    weights.write_text(weights.read_text().replace('"weights": {}', '"weights": {"sft": 1.0}'))
    (folder / "sft-seed7").mkdir()
    (folder / ".made-with.json").write_text("{}")
    run_distributed(begin, 1, 1, tree)
    assert list(parts.iterdir()) == [parts / "000000.parquet"]
    assert not (folder / "popularity/predictions.parquet").exists() and not weights.exists()
    assert not (folder / "sft-seed7").exists() and not (folder / ".made-with.json").exists()
    assert mixture.exists() and (folder / "popularity/predictions-seen-kept.parquet").exists()


def marks(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every key of the tree with the stages that it affects."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name.removesuffix("_")
        if dataclasses.is_dataclass(hint):
            yield from marks(hint, f"{key}.")
            continue
        found = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Affects)]
        yield key, found[0].stages if found else cls.__affects__


def test_every_key_of_the_evaluation_and_every_set_of_stages_is_among_the_changes() -> None:
    changed_keys = {change.partition("=")[0] for change in CHANGES}
    of_keys = dict(marks())
    assert {key for key in of_keys if key.startswith("evaluation.")} <= changed_keys
    missing = set(of_keys.values()) - {of_keys[key] for key in changed_keys}
    assert not missing, missing
