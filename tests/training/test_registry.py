"""Methods are a table: one that is registered
is trained, evaluated, reported and served.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ilrec_dist.cli.main import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import ConfigError, config_from_dict
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job, run_job
from ilrec_dist.objective.config import ObjectiveConfig, PreferenceConfig
from ilrec_dist.objective.registry import METHODS, Method, default_method, get_method, register
from ilrec_dist.pipeline.stages.train import training_stages
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import tiny_config
from tests.support.warm_torchrun import torchrun_is

pytestmark = pytest.mark.slow

MADE_UP = Method(
    "made-up",
    "A made-up method",
    lambda config: dataclasses.replace(config, cpd_mu=0.5, crr_lambda=0.0),
    compared_with=("transitions",),
)


@contextmanager
def made_up_registered() -> Iterator[None]:
    register(MADE_UP)
    try:
        yield
    finally:
        del METHODS[MADE_UP.name]


def work(_: Mesh, job: str) -> None:
    """A worker that knows the method, as the command does."""
    with made_up_registered():
        run_job(Job.from_json(job))


def run_knowing(launch: LaunchConfig, job: Job) -> None:
    run_distributed(work, launch.workers, 1, job.to_json())


@pytest.fixture
def made_up() -> Iterator[None]:
    with made_up_registered():
        yield


def test_a_registered_method_is_trained_reported_and_served(made_up, tiny, tmp_path):
    tree = config_to_dict(tiny_config(tmp_path, train={"epochs": 1}))
    tree["train"]["methods"] = ["made-up"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "tiny"
    shutil.copytree(tiny / "tiny", run)
    with torchrun_is(run_knowing):
        assert main(["run", str(tmp_path / "config.yaml")]) == 0

    results = json.loads((run / "results.json").read_text())
    rows = [row for row in results["rows"] if row["method"] == "made-up"]
    assert len(rows) == 2 and all(0 < row["hit@10"] <= 1 for row in rows)
    versus = {(interval["method"], interval["versus"]) for interval in results["paired_bootstrap"]}
    assert versus == {("made-up", "transitions")}
    assert "made-up" in (run / "report.html").read_text()
    result = json.loads((run / "train/made-up-seed0/result.json").read_text())
    assert result["method"] == "made-up"

    dataset = load_dataset(run / "data")
    table = pa.table({"user": ["a", "b"], "items": [dataset.item_ids[:3], dataset.item_ids[5:6]]})
    pq.write_table(table, tmp_path / "histories.parquet")
    flags = ["--histories", tmp_path / "histories.parquet", "--out", tmp_path / "out.parquet"]
    words = ["recommend", run, "--method", "made-up", "--top", 3, *flags]
    assert main(list(map(str, words))) == 0
    assert pq.read_table(tmp_path / "out.parquet").column("user").to_pylist() == list("aaabbb")


def test_a_name_that_is_not_registered_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="unknown method 'dqo'; expected 'sft', 'ilrec', 'dpo'"):
        get_method("dqo")
    with pytest.raises(ConfigError, match="train.methods.*'sft', 'ilrec', .* or '.*'dqo'"):
        config_from_dict({"train": {"methods": ["dqo"]}})
    with pytest.raises(ValueError, match="'sft' is registered already"):
        register(Method("sft", "", lambda config: config))
    assert list(METHODS)[:3] == ["sft", "ilrec", "dpo"]


def test_settings_without_an_effect_on_a_method_are_not_part_of_its_objective():
    sft = get_method("sft")
    one = sft.objective(ObjectiveConfig(cpd_mu=0.7, max_negatives=3, negative_scope="all"))
    assert one == sft.objective(ObjectiveConfig()) and one.is_cross_entropy
    assert one != sft.objective(ObjectiveConfig(softmax_scope="valid_next"))
    assert not sft.needs_rewards(ObjectiveConfig(crr_lambda=0.5))
    ilrec = get_method("ilrec")
    assert ilrec.needs_rewards(ObjectiveConfig())
    assert not ilrec.needs_rewards(ObjectiveConfig(crr_lambda=0.0))


def test_a_method_that_starts_from_another_needs_it_and_comes_after_it():
    with pytest.raises(ConfigError, match="dpo begins with the best weights of sft.*; add sft"):
        config_from_dict({"train": {"methods": ["dpo"]}})
    config = config_from_dict({"train": {"methods": ["dpo", "sft"], "seeds": [3, 4]}})
    stages = {stage.name: stage.after for stage in training_stages(config)}
    assert list(stages)[:2] == ["train sft seed 3", "train sft seed 4"]
    assert stages["train dpo seed 4"] == ("index", "train sft seed 4")
    two = {"train": {"methods": ["sft", "sprec"]}, "preference": {"epochs": 3}}
    with pytest.raises(ConfigError, match="2 rounds of sprec need two epochs each.*there are 3"):
        config_from_dict(two)


def test_settings_of_preference_methods_reach_those_that_read_them():
    base = {"train": {"methods": ["sft", "dpo"]}}
    for key, value in {"gamma": 2.0, "negatives": 5}.items():
        with pytest.raises(ConfigError, match=f"preference.{key}.*has no effect"):
            config_from_dict(base | {"preference": {key: value}})
    with pytest.raises(ConfigError, match="preference.beta.*has no effect"):
        config_from_dict({"preference": {"beta": 0.3}})
    own = [get_method(name).preference(PreferenceConfig(epochs=2)) for name in ("dpo", "simpo")]
    assert [(one.beta, one.negatives, one.epochs) for one in own] == [(0.1, 1, 2), (2.0, 1, 2)]
    sft, _, dpo = (
        stage.settings
        for stage in training_stages(
            config_from_dict({"train": {"methods": ["sft", "ilrec", "dpo"]}})
        )
    )
    # The settings of the methods without pairs are what they were before there was a section.
    assert "preference" not in sft and dpo["preference"]["beta"] == 0.1


@pytest.mark.parametrize(
    ("trained", "expected"), [(["sft"], "sft"), (["sft", "ilrec"], "ilrec"), (["x", "sft"], "x")]
)
def test_recommendations_come_from_the_highlighted_method_by_default(trained, expected):
    assert default_method(trained) == expected
