"""The configuration tree: round trip, overrides, and one clear line for each refusal."""

from pathlib import Path

import pytest

from ilrec_dist.common.config_fields import config_to_dict, stage_settings
from ilrec_dist.config.load import config_from_dict, dump_config, load_config
from ilrec_dist.config.tree import Config, ConfigError
from ilrec_dist.objective.registry import get_method

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_defaults_are_the_methods():
    config = Config()
    assert (config.objective.beta, config.objective.cpd_mu, config.objective.crr_lambda) == (
        1.0,
        0.1,
        0.02,
    )
    assert config_from_dict({"objective": {"penalty": "multiplicative"}}).objective.beta == 0.1
    sft = get_method("sft").objective(config.objective)
    assert (sft.beta, sft.cpd_mu, sft.crr_lambda) == (0, 0, 0)


def test_overrides_replace_values(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: 4}\n")
    config = load_config(
        path,
        [
            "train.epochs=7",
            "items.index=some/file.json",
            "train.seeds=[1, 2]",
            "train.learning_rate=1e-4",
        ],
    )
    assert (
        config.train.epochs,
        config.items.index,
        config.train.seeds,
        config.train.learning_rate,
    ) == (7, "some/file.json", [1, 2], 1e-4)
    assert config_to_dict(config)["train"]["epochs"] == 7


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epoch=3", ["train.epoch", "nearest key is 'train.epochs'"]),
        ("objectiv.cpd_mu=1", ["objectiv", "nearest key is 'objective'"]),
        ("train.epochs=many", ["train.epochs", "integer", "many"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1"]),
        ("data.format=excel", ["data.format", "'amazon', 'csv', 'lcrec'", "excel"]),
        ("train.methods=[dpo]", ["train.methods", "sft", "dpo"]),
        ("backbone=3", ["backbone"]),
        ("launch.workers=3", ["launch.workers", "tp 2", "3"]),
        ("backbone.num_heads=3", ["launch.tp", "3 attention"]),
        ("backbone.vocab_multiple=7", ["launch.tp", "vocabulary"]),
        ("backbone.hidden_size=97", ["backbone.num_heads", "97"]),
        ("objective.num_intermediate_layers=4", ["objective.num_intermediate_layers", "below"]),
        ("train.epochs", ["train.epochs", "key.sub=value"]),
        ("name.sub=1", ["name", "not a section"]),
        ("train.learning_rate=.nan", ["train.learning_rate"]),
        ("train.learning_rate=fast", ["train.learning_rate", "number", "fast"]),
        ("train.epochs=true", ["train.epochs", "integer", "True"]),
        ("train.clip_norm=true", ["train.clip_norm", "number", "True"]),
        ("train.warmup=10.0", ["train.warmup", "integer", "share", "10.0"]),
        ("launch.tp='2'", ["launch.tp", "integer", "'2'"]),
        ("evaluation.exclude_seen=1", ["evaluation.exclude_seen", "boolean", "1"]),
        (".epochs=1", [".epochs", "key.sub=value"]),
        ("name=../x", ["'name'", "folder"]),
    ],
)
def test_bad_values_name_the_key_and_what_was_expected(override, parts, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\nlaunch: {workers: 2, tp: 2}\nbackbone: {hidden_size: 96}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1,\nb", "line"),
        ("- 1\n- 2\n", "mapping"),
        ("train: {epochs: 1}\nfoo: 2\n", "unknown key 'foo'"),
        ("\xff", "cannot be read"),
        ("name: a\ntrain: {}\ntrain: {}\n", "line 3.*'train' is given twice"),
    ],
)
def test_malformed_files_are_one_line(text, part, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=part) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key", "needed"),
    [
        (["data.format=recbole", "data.time_column=when"], "data.time_column", "timestamp:float"),
        (["data.format=lcrec", "data.synthetic.users=7"], "data.synthetic", "it is for synthetic"),
        (["data.format=lcrec", "data.items_path=x.csv"], "data.items_path", "amazon, csv, parquet"),
        (["data.split_ratio=[0.6, 0.2, 0.2]"], "data.split_ratio", "data.split=chronological"),
        (["data.min_user_interactions=3"], "data.min_user_interactions", "reads no file"),
        (["items.index=a.index.json", "items.levels=2"], "items.levels", "without items.index"),
        (["items.form=atomic", "items.codes_per_level=8"], "items.codes_per_level", "semantic"),
        (["items.title_tokens=8"], "items.title_tokens", "items.form titles"),
        (["items.form=atomic", "items.text_model=m"], "items.text_model", "built or resolved"),
        (["cf.reward_replicas=2"], "cf.reward_replicas", "cf.rewards actor"),
        (["train.methods=[sft]", "cf.rewards=actor"], "cf.rewards", "reads rewards"),
        (["train.methods=[sft]", "cf.reward_index=flat"], "cf.reward_index", "reads rewards"),
        (["objective.crr_lambda=0", "cf.reward_cache=true"], "cf.reward_cache", "crr_lambda"),
        (["items.form=atomic", "items.collisions=refuse"], "items.collisions", "titles"),
        (["items.embedding=cf", "items.embedding_dim=8"], "items.embedding_dim", r"text\+cf"),
        (["items.embedding=cf", "items.text_model=m"], "items.text_model", r"text\+cf"),
        (
            ["items.text_model=m", "items.embedding_dim=8"],
            "items.embedding_dim",
            "without items.text_model",
        ),
        (
            [
                "items.form=titles",
                "train.targets=last",
                "items.tokenizer=t.json",
                "items.title_vocab_size=999",
            ],
            "items.title_vocab_size",
            "items.tokenizer null",
        ),
        (
            ["objective.cpo_beta=0", "objective.penalty=multiplicative"],
            "objective.penalty",
            "cpo_beta above 0",
        ),
        (
            ["objective.cpo_beta=0", "objective.crr_lambda=0", "objective.max_negatives=3"],
            "objective.max_negatives",
            "crr_lambda above 0",
        ),
        (
            [
                "objective.cpd_mu=0",
                "objective.negatives_from=final",
                "objective.num_intermediate_layers=1",
            ],
            "objective.num_intermediate_layers",
            "negatives_from",
        ),
        (
            ["objective.backend=reference", "objective.workspace_mib=9"],
            "objective.workspace_mib",
            "torch or triton",
        ),
        (["backbone.rope_theta=5e5"], "backbone.rope_theta", "position_embedding rope"),
        (["backbone.qkv_bias=true"], "backbone.qkv_bias", "backbone.bias false"),
        (
            ["objective.cpd_mu=0", "objective.distill_scope=all"],
            "objective.distill_scope",
            "cpd_mu",
        ),
        (["train.methods=[sft]", "objective.cpd_mu=0.3"], "objective.cpd_mu", "train.methods"),
        (
            ["launch.engine=torchrun", "launch.ray_address=h:1"],
            "launch.ray_address",
            "launch.engine ray",
        ),
    ],
)
def test_a_key_without_effect_is_refused_with_what_would_give_it_one(
    overrides, key, needed, tmp_path
):
    (tmp_path / "c.yaml").write_text("data: {path: toys}\n" if "data." in overrides[0] else "")
    if overrides[0].startswith("data.") and "format" not in overrides[0]:
        (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match=f"'{key}': has no effect .*{needed}") as error:
        load_config(tmp_path / "c.yaml", overrides)
    assert "\n" not in str(error.value)


def test_a_key_without_effect_may_stand_at_its_default(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {format: lcrec, path: toys, time_column: timestamp}\n")
    load_config(tmp_path / "c.yaml", ["items.levels=3", "cf.reward_replicas=1"])


def test_every_field_says_which_stages_it_affects():
    for stage in ("prepare", "index", "cf", "rewards", "train", "evaluate"):
        assert stage_settings(Config(), stage)
