"""A key of the configuration that has no effect beside the others is refused, for every
key.

The two tables below hold every key of the tree, so that a new key cannot be forgotten:
it has an effect in every configuration, or it is refused where it has none.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config, ConfigError
from ilrec_dist.data.settings import ineffective_settings

PACKAGE = Path(__file__).parents[1] / "ilrec_dist"

# Keys that are read whatever the others say. A limit counts as read where it is not reached.
ALWAYS = {
    "name",
    "runs_dir",
    "data.format",
    "data.split",
    "data.both_directions",
    "items.form",
    *(
        f"cf.{key}"
        for key in (
            "hidden_size num_layers num_heads dropout max_history epochs patience batch_size "
            "learning_rate weight_decay cf_folds split_table seed"
        ).split()
    ),
    "backbone.from",
    # Added tokens of a pretrained model are padded as the vocabulary of a new one.
    "backbone.vocab_multiple",
    # Of these, plain cross-entropy reads the scope of its softmax and how it is computed.
    "objective.softmax_scope",
    "objective.backend",
    *(
        f"train.{key}"
        for key in (
            "methods seeds targets max_history users epochs batch_size micro_batch_tokens "
            "learning_rate min_learning_rate_ratio warmup weight_decay adam_beta2 clip_norm "
            "precision checkpoint_steps keep_checkpoints validate_epochs validation_users patience "
            "max_bad_steps recompute tracker"
        ).split()
    ),
    "evaluation.beam",
    "evaluation.users",
    "evaluation.exclude_seen",
    "evaluation.baselines",
    "evaluation.batch_size",
    "evaluation.fusion",
    "evaluation.examples",
    "launch.engine",
    "launch.workers",
    "launch.tp",
    "launch.device",
    "launch.threads",
    "launch.max_failures",
    "launch.timeout_seconds",
}

# Refused elsewhere, with a message of its own.
REFUSED_OTHERWISE = {
    "items.index": ["items.form=atomic", "items.index=x"],
    "items.collisions": ["items.form=titles", "train.targets=last", "items.collisions=resolve"],
}

LCREC = ["data.format=lcrec", "data.path=toys"]
CSV = ["data.format=csv", "data.path=toys.csv"]
GIVEN = ["items.index=a.index.json"]
RESOLVED = [*GIVEN, "items.collisions=resolve"]
TITLES = ["items.form=titles", "train.targets=last"]
NO_REWARDS = ["objective.crr_lambda=0"]
SFT = ["train.methods=[sft]"]
ONLY_SFT = "train.methods"
PRETRAINED = ["backbone.from=no/such/model"]
PROMPTED = [*PRETRAINED, "prompts.templates=no-such.yaml", "train.targets=last"]
HALF = "prompts.shares.next_item=0.5"
INDEXED = ["cf.reward_index=flat"]

# key → (a value, settings beside which it has an effect, and pairs of settings beside which it has
# none with what the refusal says).
Case = tuple[str, list[str], list[tuple[list[str], str]]]
SOMETIMES: dict[str, Case] = {
    "data.path": ("x", ["data.format=lcrec"], [([], "reads no file")]),
    "data.items_path": ("x.csv", CSV, [(LCREC, "amazon, csv, parquet")]),
    "data.user_column": ("u", CSV, [(LCREC, "csv, parquet")]),
    "data.item_column": ("i", CSV, [(LCREC, "csv, parquet")]),
    "data.time_column": (
        "when",
        CSV,
        [(["data.format=recbole", "data.path=x"], "timestamp:float"), (LCREC, "csv, parquet")],
    ),
    "data.min_user_interactions": ("3", LCREC, [([], "reads no file")]),
    "data.min_item_interactions": ("3", LCREC, [([], "reads no file")]),
    "data.split_ratio": (
        "[0.6, 0.2, 0.2]",
        ["data.split=chronological"],
        [
            ([], "data.split=chronological"),
            (["data.split=chronological", "data.split_dates=[1, 2]"], "data.split_dates"),
        ],
    ),
    "data.split_dates": (
        "['2018-01-01', '2018-02-01']",
        ["data.split=chronological"],
        [([], "data.split=chronological")],
    ),
    "data.max_bad_rows": ("3", LCREC, [([], "reads no file")]),
    **{
        f"data.synthetic.{key}": ("7", [], [(LCREC, "it is for synthetic")])
        for key in ("users", "items", "categories", "mean_length", "seed")
    },
    "items.index": ("a.index.json", [], []),
    "items.embedding": ("cf", [], [(GIVEN, "without items.index"), (TITLES, "semantic")]),
    "items.text_model": (
        "m",
        RESOLVED,
        [
            (["items.form=atomic"], "built or resolved"),
            (GIVEN, "built or resolved"),
            (["items.embedding=cf"], r"text\+cf"),
        ],
    ),
    "items.embedding_dim": (
        "8",
        RESOLVED,
        [
            (GIVEN, "built or resolved"),
            (["items.embedding=cf"], r"text\+cf"),
            (["items.text_model=m"], "without items.text_model"),
        ],
    ),
    "items.levels": ("2", [], [(GIVEN, "without items.index"), (TITLES, "semantic")]),
    "items.codes_per_level": ("8", [], [(["items.form=atomic"], "semantic"), (GIVEN, "semantic")]),
    "items.tokenizer": (
        "t.json",
        TITLES,
        [([], "items.form titles"), ([*TITLES, *PRETRAINED], "backbone.from null")],
    ),
    "items.title_vocab_size": (
        "999",
        TITLES,
        [
            ([], "items.form titles"),
            ([*TITLES, "items.tokenizer=t.json"], "items.tokenizer null"),
            ([*TITLES, *PRETRAINED], "backbone.from and items.tokenizer null"),
        ],
    ),
    "items.title_tokens": ("8", TITLES, [([], "items.form titles")]),
    "items.collisions": ("refuse", TITLES, [(["items.form=atomic"], "titles")]),
    "items.seed": (
        "3",
        ["items.text_model=m"],
        [
            (GIVEN, "built or resolved"),
            (TITLES, "built or resolved"),
            (["items.form=atomic"], "built or resolved"),
            ([*RESOLVED, "items.text_model=m"], "resolved without items.text_model"),
        ],
    ),
    "cf.rewards": ("actor", [], [(SFT, "reads rewards"), (NO_REWARDS, "crr_lambda")]),
    "cf.reward_index": ("flat", [], [(SFT, "reads rewards"), (NO_REWARDS, "crr_lambda")]),
    "cf.reward_shards": (
        "2",
        INDEXED,
        [
            ([*SFT, "cf.reward_index=auto"], "reads rewards"),
            (["cf.reward_index=scan"], "cf.reward_index flat, ivf_pq or hnsw"),
        ],
    ),
    "cf.reward_replicas": ("2", ["cf.rewards=actor"], [([], "cf.rewards actor")]),
    "cf.reward_retries": ("2", ["cf.rewards=actor"], [([], "cf.rewards actor")]),
    "cf.reward_cache": ("true", [], [(SFT, "reads rewards"), (NO_REWARDS, "crr_lambda")]),
    "train.trainable": ("lora", PRETRAINED, [([], "a (pretrained )?model")]),
    **{
        f"train.lora.{key}": (
            value,
            [*PRETRAINED, "train.trainable=lora"],
            [(PRETRAINED, "train.trainable lora")],
        )
        for key, value in (
            ("rank", "4"),
            ("alpha", "7"),
            ("target_modules", "[q_proj]"),
            ("dropout", "0.1"),
        )
    },
    "train.accumulation_steps": (
        "2",
        [],
        [(["train.micro_batch_tokens=64"], "train.micro_batch_tokens null")],
    ),
    "train.new_rows_learning_rate": (
        "0.1",
        PRETRAINED,
        [([], "backbone.from"), ([*PRETRAINED, "train.trainable=lora"], "full or lora.new_rows")],
    ),
    "train.zero_stage": (
        "2",
        ["launch.workers=2", "launch.tp=1"],
        [([], "several data-parallel processes")],
    ),
    "backbone.new_tokens": (
        "text",
        PRETRAINED,
        [([], "a model in backbone.from"), ([*TITLES, *PRETRAINED], "semantic or atomic")],
    ),
    "prompts.templates": (
        "no-such.yaml",
        [*PRETRAINED, "train.targets=last"],
        [(["train.targets=last"], "a model in backbone.from")],
    ),
    "prompts.chat": ("true", PROMPTED, [([], "prompts.templates")]),
    "prompts.max_tokens": ("99", PROMPTED, [([], "prompts.templates")]),
    "prompts.shares.next_item": (
        "0.5",
        [*PROMPTED, "prompts.shares.title_to_codes=0.5"],
        [([], "prompts.templates")],
    ),
    **{
        f"prompts.shares.{key}": (
            "0.5",
            [*PROMPTED, HALF],
            [([], "prompts.templates"), ([*PROMPTED, HALF, *TITLES], "semantic or atomic")],
        )
        for key in (
            "titles_to_next_codes",
            "codes_to_next_title",
            "title_to_codes",
            "codes_to_title",
        )
    },
    **{
        f"backbone.{key}": (value, beside, [(PRETRAINED, "backbone.from null")])
        for key, value, beside in (
            ("num_layers", "3", []),
            ("hidden_size", "64", []),
            ("num_heads", "2", []),
            ("num_kv_heads", "2", []),
            ("ffn_hidden_size", "64", []),
            ("normalization", "RMSNorm", []),
            ("activation", "swiglu", []),
            ("position_embedding", "rope", []),
            ("bias", "false", []),
            ("qk_norm", "true", []),
            ("head_dim", "16", []),
            ("norm_epsilon", "1e-6", []),
            ("dropout", "0.2", []),
            ("tie_embeddings", "false", []),
            ("init_std", "0.1", []),
        )
    },
    "backbone.qkv_bias": (
        "true",
        ["backbone.bias=false"],
        [([], "backbone.bias false"), (PRETRAINED, "backbone.from null")],
    ),
    **{
        f"backbone.{key}": (
            "8.0",
            ["backbone.position_embedding=rope"],
            [([], "position_embedding rope"), (PRETRAINED, "backbone.from null")],
        )
        for key in ("rope_theta", "rope_scaling_factor")
    },
    "objective.num_intermediate_layers": (
        "1",
        [],
        [
            (["objective.cpd_mu=0", "objective.negatives_from=final"], "negatives_from"),
            (SFT, ONLY_SFT),
        ],
    ),
    **{
        f"objective.{key}": (
            value,
            ["objective.cpo_beta=0"],
            [(["objective.cpo_beta=0", *NO_REWARDS], "crr_lambda above 0"), (SFT, ONLY_SFT)],
        )
        for key, value in (
            ("negatives_from", "final"),
            ("negative_threshold", "0.5"),
            ("max_negatives", "3"),
            ("negative_scope", "all"),
        )
    },
    "objective.penalty": (
        "multiplicative",
        [],
        [(["objective.cpo_beta=0"], "cpo_beta above 0"), (SFT, ONLY_SFT)],
    ),
    "objective.cpo_beta": ("0.5", [], [(SFT, ONLY_SFT)]),
    "objective.cpd_mu": ("0.3", [], [(SFT, ONLY_SFT)]),
    "objective.distill_scope": ("all", [], [(["objective.cpd_mu=0"], "cpd_mu"), (SFT, ONLY_SFT)]),
    "objective.crr_lambda": ("0.3", [], [(SFT, ONLY_SFT)]),
    "objective.reward_floor": ("0.1", [], [(NO_REWARDS, "crr_lambda"), (SFT, ONLY_SFT)]),
    "objective.ramp": (
        "0.1",
        [],
        [
            (["objective.cpo_beta=0", "objective.cpd_mu=0", *NO_REWARDS], "cpd_mu or .* above 0"),
            (SFT, ONLY_SFT),
        ],
    ),
    **{
        f"preference.{key}": (
            value,
            [f"train.methods=[sft, {method}]"],
            [([], "none of train.methods"), ([f"train.methods=[sft, {other}]"], "train.methods")],
        )
        for key, value, method, other in (
            ("gamma", "0.5", "simpo", "dpo"),
            ("negatives", "5", "sdpo", "dpo"),
            ("rounds", "3", "sprec", "dpo"),
        )
    },
    **{
        f"preference.{key}": (value, ["train.methods=[sft, dpo]"], [([], "none of train.methods")])
        for key, value in (("beta", "0.5"), ("epochs", "4"), ("learning_rate", "0.1"))
    },
    "objective.workspace_mib": ("9", [], [(["objective.backend=reference"], "torch or triton")]),
    "evaluation.fusion_candidates": (
        "9",
        ["evaluation.fusion=true"],
        [([], "evaluation.fusion true")],
    ),
    "launch.sequence_parallel": (
        "true",
        ["launch.workers=2", "launch.tp=2"],
        [([], "launch.tp above 1")],
    ),
    "launch.tp_across_nodes": (
        "true",
        ["launch.workers=2", "launch.tp=2"],
        [
            ([], "launch.tp above 1"),
            (["launch.engine=torchrun", "launch.workers=2", "launch.tp=2"], "launch.engine ray"),
        ],
    ),
    "launch.ray_address": ("h:1", [], [(["launch.engine=torchrun"], "launch.engine ray")]),
}


def keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the tree, without the sections themselves."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name.removesuffix("_")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{key}.")
        else:
            yield key


def test_every_key_is_in_one_of_the_tables() -> None:
    assert not ALWAYS & SOMETIMES.keys()
    assert set(keys()) == ALWAYS | SOMETIMES.keys(), (
        "a key of the configuration is missing here: say whether it has an effect in every "
        "configuration, and if not, give it an OnlyIf and put the refusals into SOMETIMES"
    )


def test_every_key_is_read_somewhere() -> None:
    """As an attribute, in the sections themselves as one of `self`."""
    read = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            if of_self or path.name != "config.py":
                read.add(node.attr.removesuffix("_"))
    # The shares are read as a whole, as a mapping.
    names = {key.rpartition(".")[2] for key in keys() if not key.startswith("prompts.shares.")}
    assert names - read == set() and "shares" in read


def settings(key: str, value: str, beside: list[str]) -> list[str]:
    return [*beside, f"{key}={value}"]


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text("")
    return tmp_path / "c.yaml"


@pytest.mark.parametrize(
    ("overrides", "key", "needed"),
    [
        (settings(key, value, without), key, needed)
        for key, (value, _, refusals) in SOMETIMES.items()
        for without, needed in refusals
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_key_without_effect_is_refused_with_what_would_give_it_one(
    overrides: list[str], key: str, needed: str, empty: Path
) -> None:
    # Where a whole section has none, the section is named.
    section, _, leaf = key.rpartition(".")
    pattern = rf"'{section}(\.{leaf})?': has no effect .*{needed}"
    with pytest.raises(ConfigError, match=pattern) as error:
        load_config(empty, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", SOMETIMES)
def test_a_key_with_an_effect_is_taken(key: str, empty: Path) -> None:
    value, beside, refusals = SOMETIMES[key]
    found, default = load_config(empty, settings(key, value, beside)), Config()
    for name in key.split("."):
        field = "from_" if name == "from" else name
        found, default = getattr(found, field), getattr(default, field)
    assert found != default
    assert refusals or key in REFUSED_OTHERWISE


@pytest.mark.parametrize("overrides", REFUSED_OTHERWISE.values(), ids=lambda value: " ".join(value))
def test_values_that_another_forbids_are_refused(overrides: list[str], empty: Path) -> None:
    with pytest.raises(ConfigError, match="items.form"):
        load_config(empty, overrides)


def test_a_key_without_effect_may_stand_at_its_default(empty: Path) -> None:
    load_config(empty, [*LCREC, "data.time_column=timestamp", "items.levels=3"])
    load_config(empty, ["cf.reward_replicas=1", "launch.device=cuda", "launch.threads=null"])
    assert list(ineffective_settings(Config().data)) == []
