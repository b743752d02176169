"""A stage runs again exactly when its input bytes or relevant settings change.

It never runs on output of another configuration.
"""

import json

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.execute import execute, open_run
from ilrec_dist.pipeline.stages.train import training_stages


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "toys"
    folder.mkdir()
    sequences = {f"u{u}": [f"i{i}" for i in rng.choice(12, 8, replace=False)] for u in range(30)}
    (folder / "toys.inter.json").write_text(json.dumps(sequences))
    (folder / "toys.index.json").write_text(
        json.dumps({f"i{i}": [f"<a_{i % 3}>", f"<b_{i // 3}>"] for i in range(12)})
    )
    (tmp_path / "c.yaml").write_text(
        f"name: t\nruns_dir: {tmp_path}/runs\ndata: {{format: lcrec, path: {folder}}}\n"
        f"items: {{index: {folder}/toys.index.json}}\n"
        "train: {methods: [sft, ilrec], seeds: [0, 1]}\n"
    )
    return tmp_path


def config_of(source, *overrides: str) -> Config:
    return load_config(source / "c.yaml", overrides)


def current(config: Config) -> set[str]:
    run = open_run(config)
    return {name for name in ("prepare", "index") if run.is_current(name)}


def test_unchanged_stages_are_not_run_again(source, capsys):
    execute(config_of(source), "prepare")
    execute(config_of(source), "index")
    written = source / "runs/t/items/catalogue.json"
    stamp = written.stat().st_mtime_ns
    execute(config_of(source, "train.epochs=3"), "prepare")
    execute(config_of(source, "train.epochs=3"), "index")
    assert written.stat().st_mtime_ns == stamp
    assert "unchanged" in capsys.readouterr().out


def test_a_changed_input_byte_reruns_the_stage_and_all_that_follow(source):
    execute(config_of(source), "prepare")
    execute(config_of(source), "index")
    assert current(config_of(source)) == {"prepare", "index"}
    path = source / "toys/toys.inter.json"
    path.write_text(path.read_text() + " ")
    assert current(config_of(source)) == set()
    execute(config_of(source), "prepare")
    execute(config_of(source), "index")
    index = source / "toys/toys.index.json"
    index.write_text(index.read_text() + "\n")
    assert current(config_of(source)) == {"prepare"}


def test_a_training_stands_on_the_collaborative_models_that_reward_it(source):
    stages = {stage.training.method: stage for stage in training_stages(config_of(source))}
    # The rewards stage writes what is made of some of these models only.
    assert {"cf", "rewards"} <= set(stages["ilrec"].after)
    assert not {"cf", "rewards"} & set(stages["sft"].after)


def test_moving_the_input_changes_nothing(source):
    execute(config_of(source), "prepare")
    (source / "toys").rename(source / "elsewhere")
    moved = (f"data.path={source}/elsewhere", f"items.index={source}/elsewhere/toys.index.json")
    assert current(config_of(source, *moved)) == {"prepare"}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        (
            "data.min_item_interactions=2",
            {
                "prepare",
                "index",
                "cf",
                "rewards",
                "train sft seed 0",
                "train ilrec seed 1",
                "evaluate",
            },
        ),
        (
            "items.collisions=resolve",
            {"index", "rewards", "train sft seed 0", "train ilrec seed 1", "evaluate"},
        ),
        (
            "data.both_directions=true",
            {"cf", "rewards", "train sft seed 0", "train ilrec seed 1", "evaluate"},
        ),
        ("cf.hidden_size=32", {"cf", "rewards", "train ilrec seed 1", "evaluate"}),
        ("cf.reward_index=flat", {"rewards", "train ilrec seed 1", "evaluate"}),
        ("cf.reward_shards=2", {"rewards", "train ilrec seed 1", "evaluate"}),
        ("objective.cpd_mu=0.5", {"train ilrec seed 1", "evaluate"}),
        (
            "objective.softmax_scope=valid_next",
            {"train sft seed 0", "train ilrec seed 1", "evaluate"},
        ),
        ("backbone.num_layers=6", {"train sft seed 0", "train ilrec seed 1", "evaluate"}),
        ("evaluation.beam=30", {"train sft seed 0", "train ilrec seed 1", "evaluate"}),
        ("evaluation.batch_size=2", set()),
        ("evaluation.examples=2", set()),
        ("evaluation.baselines=[caser]", {"evaluate"}),
        (
            "data.max_bad_rows=3",
            {
                "prepare",
                "index",
                "cf",
                "rewards",
                "train sft seed 0",
                "train ilrec seed 1",
                "evaluate",
            },
        ),
        ("objective.workspace_mib=8", set()),
        ("train.checkpoint_steps=7", set()),
        ("launch.threads=1", set()),
        ("launch.max_failures=1", set()),
        ("cf.rewards=actor", set()),
        ("launch.tp=1", set()),
        ("train.keep_checkpoints=5", set()),
        ("train.epochs=3", {"train sft seed 0", "train ilrec seed 1", "evaluate"}),
        ("launch.workers=2", set()),
    ],
)
def test_each_key_reruns_what_it_is_relevant_to(source, override, changed):
    assert reruns(config_of(source), config_of(source, override)) == changed


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        (
            "cf.hidden_size=32",
            {"cf", "index", "rewards", "train sft seed 0", "train ilrec seed 1", "evaluate"},
        ),
        (
            "items.levels=2",
            {"index", "rewards", "train sft seed 0", "train ilrec seed 1", "evaluate"},
        ),
        ("cf.reward_index=flat", {"rewards", "train ilrec seed 1", "evaluate"}),
        ("cf.reward_cache=true", set()),
    ],
)
def test_each_key_where_the_codes_come_from_the_cf_model(source, override, changed):
    from_cf = ("items.index=null", "items.embedding=cf")
    assert reruns(config_of(source, *from_cf), config_of(source, *from_cf, override)) == changed


def reruns(before: Config, after: Config) -> set[str]:
    old, new = open_run(before), open_run(after)
    names = (
        "prepare",
        "index",
        "cf",
        "rewards",
        "train sft seed 0",
        "train ilrec seed 1",
        "evaluate",
    )
    return {name for name in names if old.fingerprint(name) != new.fingerprint(name)}


def test_what_is_missing_is_said_before_a_stage_of_the_command_runs(source):
    execute(config_of(source), "prepare")
    with pytest.raises(UserError, match="stage index has not been made; run `ilrec index CONFIG`"):
        # The rewards stage would need it.
        execute(config_of(source), "cf")
    assert not (source / "runs/t/cf").exists()


def test_a_stage_refuses_to_stand_on_what_is_missing_or_of_another_configuration(source):
    with pytest.raises(
        UserError, match="stage prepare has not been made; run `ilrec prepare CONFIG`"
    ):
        execute(config_of(source), "index")
    execute(config_of(source), "prepare")
    with pytest.raises(UserError, match="stage prepare was made by another configuration"):
        execute(config_of(source, "data.min_item_interactions=2"), "index")


def test_resume_needs_a_run_of_the_same_configuration(source):
    with pytest.raises(UserError, match="nothing to resume"):
        execute(config_of(source), "prepare", resume=True)
    execute(config_of(source), "prepare")
    execute(config_of(source), "prepare", resume=True)
    with pytest.raises(
        UserError, match="stage prepare in this run folder is of another configuration"
    ):
        execute(config_of(source, "data.min_user_interactions=6"), "prepare", resume=True)


def test_a_missing_input_is_named_before_anything_is_written(source):
    (source / "toys/toys.index.json").unlink()
    with pytest.raises(UserError, match="toys.index.json"):
        execute(config_of(source), "index")
    assert not (source / "runs").exists()
