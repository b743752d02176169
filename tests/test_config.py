"""The configuration tree: round trip,
overrides, and one clear line for each refusal.
"""

from pathlib import Path

import pytest

from ilrec_dist.common.config_fields import config_to_dict, stage_settings
from ilrec_dist.config.load import config_from_dict, dump_config, load_config
from ilrec_dist.config.tree import Config, ConfigError
from ilrec_dist.objective.registry import get_method

# tests/study has those that are studies.
CONFIGS = [
    path
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    if not path.name.startswith("study-")
]


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
        ("data.format=excel", ["data.format", "'amazon', 'csv', ", "excel"]),
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


def test_every_field_says_which_stages_it_affects():
    for stage in ("prepare", "index", "cf", "rewards", "train", "evaluate"):
        assert stage_settings(Config(), stage)
