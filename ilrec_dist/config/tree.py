"""The root of the configuration tree, and the checks that need more than one key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, TypeVar

from annotated_types import MinLen

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.common.config_fields import (
    Affects,
    config_to_dict,
    fields_without_effect,
    key_of,
    section,
)
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.settings import ineffective_settings
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.model.config import BackboneConfig, tensor_parallel_problem
from ilrec_dist.model.decoder import known_decoder
from ilrec_dist.objective.config import ObjectiveConfig, PreferenceConfig
from ilrec_dist.objective.registry import Method, get_method
from ilrec_dist.prompts.config import PromptsConfig
from ilrec_dist.prompts.template import read_templates, template_file
from ilrec_dist.training.config import TrainConfig


class ConfigError(UserError):
    """A key, type or value that the tree does not take.

    Names the key, what was expected and, for an unknown key, the nearest one.
    """


@section()
class Config:
    name: Annotated[str, MinLen(1), Affects()] = "run"
    # The run's folder is runs_dir/name.
    runs_dir: Annotated[str, Affects()] = "runs"
    data: DataConfig = field(default_factory=DataConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    cf: CFConfig = field(default_factory=CFConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


# A key and what is wrong with its value.
Problem = tuple[str, str]
T = TypeVar("T")


def check_together(config: Config, source: str) -> None:
    """Refuse values that are impossible, or without effect, only together with others.

    `source` is named in the error. Raises ConfigError.
    """
    checks = (
        _run_problems,
        _mesh_problems,
        _training_problems,
        _items_problems,
        _prompt_problems,
        _idle_keys,
    )
    for check in checks:
        for key, why in check(config):
            raise ConfigError(f"{source}: key {key!r}: {why}")


def _run_problems(config: Config) -> Iterator[Problem]:
    if Path(config.name).name != config.name:
        yield (
            "name",
            f"expected the name of a folder, found {config.name!r}; runs_dir says where it lies",
        )
    if config.data.format != "synthetic" and config.data.path is None:
        yield "data.path", f"data.format {config.data.format!r} needs the path of the data"
    shares = config.data.split_ratio
    if abs(sum(shares) - 1) > 1e-6:
        yield "data.split_ratio", f"the shares {shares} add up to {sum(shares):g}, expected 1"
    if config.cf.hidden_size % config.cf.num_heads:
        yield (
            "cf.num_heads",
            f"{config.cf.num_heads} heads do not divide cf.hidden_size {config.cf.hidden_size}",
        )
    if config.cf.rewards == "actor" and config.launch.engine != "ray":
        yield (
            "cf.rewards",
            "the reward actor needs launch.engine ray; with torchrun choose in_process",
        )


def _mesh_problems(config: Config) -> Iterator[Problem]:
    """Sizes of the backbone that its heads or
    the tensor-parallel processes do not divide.
    """
    backbone, launch = known_decoder(config.backbone), config.launch
    if launch.workers % launch.tp:
        yield (
            "launch.workers",
            f"a world size of {launch.workers} is not a multiple of launch.tp {launch.tp}; choose "
            "workers = tp × data-parallel copies",
        )
    if config.backbone.vocab_multiple % launch.tp:
        yield (
            "launch.tp",
            f"tp {launch.tp} does not divide the vocabulary, padded to a multiple of "
            f"backbone.vocab_multiple {config.backbone.vocab_multiple}",
        )
    if backbone is None:
        return
    if backbone.head_dim is None and backbone.hidden_size % backbone.num_heads:
        yield (
            "backbone.num_heads",
            f"{backbone.num_heads} heads do not divide backbone.hidden_size {backbone.hidden_size}",
        )
    kv_heads = backbone.num_kv_heads or backbone.num_heads
    if backbone.num_heads % kv_heads:
        yield (
            "backbone.num_kv_heads",
            f"{kv_heads} key/value heads do not divide backbone.num_heads {backbone.num_heads}",
        )
    problem = tensor_parallel_problem(backbone, launch.tp)
    if problem is not None:
        yield "launch.tp", problem


def _training_problems(config: Config) -> Iterator[Problem]:
    backbone, train = known_decoder(config.backbone), config.train
    layers = config.objective.num_intermediate_layers
    if backbone is not None and layers is not None and layers >= backbone.num_layers:
        yield (
            "objective.num_intermediate_layers",
            f"{layers} must be below the {backbone.num_layers} layers of the backbone",
        )
    reading = [
        name
        for name in train.methods
        if get_method(name).needs_intermediate_layers(config.objective)
    ]
    if backbone is not None and backbone.num_layers < 2 and reading:
        yield (
            "backbone.num_layers",
            f"{reading[0]} needs at least 2 layers, one of them intermediate",
        )
    per_step = config.launch.dp * train.accumulation_steps
    if train.batch_size % per_step:
        yield (
            "train.batch_size",
            f"{train.batch_size} must be a multiple of launch.dp × train.accumulation_steps = "
            f"{per_step}",
        )
    if train.lora.dropout > 0 and config.launch.tp > 1:
        yield (
            "train.lora.dropout",
            f"{train.lora.dropout} needs launch.tp 1, not {config.launch.tp}: the input of "
            "row-parallel layers is cut over the ranks; set it to 0",
        )
    if config.items.form == "titles" and train.trainable.endswith("new_rows"):
        yield (
            "train.trainable",
            f"{train.trainable} needs item tokens that are added to the model's, and items.form "
            "titles adds none; expected full or lora",
        )
    if config.items.form == "titles" and train.new_rows_learning_rate is not None:
        yield (
            "train.new_rows_learning_rate",
            "has no effect here: items.form titles adds no rows to the model; leave it out",
        )
    if config.objective.negatives_from == "random":
        for key, value, expected in (
            ("objective.negative_scope", config.objective.negative_scope, "valid_next"),
            ("launch.tp", config.launch.tp, 1),
        ):
            if value != expected:
                yield key, f"objective.negatives_from random needs {expected}, found {value}"
        if config.objective.backend == "triton":
            yield (
                "objective.backend",
                "objective.negatives_from random needs torch or reference, found triton",
            )
    if len(set(train.seeds)) != len(train.seeds):
        yield "train.seeds", f"expected distinct seeds, found {train.seeds}"
    if len(set(train.methods)) != len(train.methods):
        yield "train.methods", f"expected distinct methods, found {train.methods}"
    for name in train.methods:
        method = get_method(name)
        preference = method.preference(config.preference)
        epochs = preference.epochs or train.epochs
        if method.samples == "self_play_pairs" and epochs < 2 * preference.rounds:
            yield (
                "preference.rounds",
                f"{preference.rounds} rounds of {name} need two epochs each, one of them "
                f"supervised, and there are {epochs}; lower preference.rounds or raise "
                "preference.epochs",
            )
        start = method.starts_from
        if start is not None and start not in train.methods:
            yield (
                "train.methods",
                f"{name} begins with the best weights of {start}, which is not among "
                f"{train.methods}; add {start}",
            )


def _items_problems(config: Config) -> Iterator[Problem]:
    items = config.items
    codes = items.codes_per_level
    if items.form == "semantic" and items.index is None and codes & (codes - 1):
        yield (
            "items.codes_per_level",
            f"expected a power of two, found {codes}; try {1 << (codes.bit_length() - 1)}",
        )
    if items.form != "semantic" and items.index is not None:
        yield (
            "items.index",
            f"an index file gives code tuples, which items.form {items.form} has none of; leave "
            "one of the two out",
        )
    if items.form == "titles" and items.collisions == "resolve":
        yield (
            "items.collisions",
            "items of one title cannot be told apart by other tokens (items.form titles); "
            "expected keep or refuse",
        )
    if items.form == "titles" and config.train.targets != "last":
        yield (
            "train.targets",
            "items.form titles takes one target a sequence; expected last",
        )


def _prompt_problems(config: Config) -> Iterator[Problem]:
    prompts, own_form = config.prompts, "titles" if config.items.form == "titles" else "codes"
    if prompts.templates is None:
        return
    shares = config_to_dict(prompts.shares)
    if abs(sum(shares.values()) - 1) > 1e-6:
        yield "prompts.shares", f"the shares add up to {sum(shares.values()):g}, expected 1"
    if config.train.targets != "last":
        yield "train.targets", "a prompt has one target (prompts.templates); expected last"
    for name in config.train.methods:
        if get_method(name).samples != "targets":
            yield (
                "train.methods",
                f"{name} compares items behind plain sequences; leave it or prompts.templates out",
            )
    if not template_file(prompts.templates).is_file():
        # The stage that reads it says so.
        return
    templates = [t for t in read_templates(prompts.templates) if shares[t.task.name] > 0]
    missing = [
        name
        for name, share in shares.items()
        if share and name not in {t.task.name for t in templates}
    ]
    if missing:
        yield (
            f"prompts.shares.{missing[0]}",
            f"{prompts.templates} has no template of that task; set the share to 0 or add one",
        )
    for template in templates:
        if template.response != own_form and not template.task.is_text:
            yield (
                "prompts.templates",
                f"template {template.name} answers with {template.response}, and items are "
                f"{own_form} (items.form {config.items.form})",
            )
        if own_form == "titles" and template.history != "titles":
            yield (
                "prompts.templates",
                f"template {template.name} writes codes, which items.form titles has none of",
            )


def idle_keys(config: Config) -> Iterator[str]:
    """Every key that is set to another value
    than its default and that nothing reads.
    """
    return (key for key, _ in _idle_keys(config))


def _idle_keys(config: Config) -> Iterator[Problem]:
    """Keys that the user set, to another value
    than the default, and that nothing reads.
    """
    yield from ineffective_settings(config.data)
    for key, condition in fields_without_effect(config):
        yield key, f"has no effect here: it needs {condition}; set that, or leave {key} out"
    methods = [get_method(name) for name in config.train.methods]
    if not any(method.needs_rewards(config.objective) for method in methods):
        for name in ("rewards", "reward_index", "reward_shards", "reward_cache"):
            if getattr(config.cf, name) != getattr(CFConfig(), name):
                yield (
                    f"cf.{name}",
                    f"has no effect here: none of train.methods {config.train.methods} reads "
                    "rewards; add one that does (with objective.crr_lambda above 0), or leave "
                    f"cf.{name} out",
                )
    yield from _unread_settings(
        "objective", config.objective, methods, lambda method, values: method.objective(values)
    )
    yield from _unread_settings(
        "preference", config.preference, methods, lambda method, values: method.preference(values)
    )


def _unread_settings(
    section: str, config: T, methods: Sequence[Method], settings_of: Callable[[Method, T], T]
) -> Iterator[Problem]:
    """Settings of a section that do not change
    what any of the methods takes from it.
    """
    names = [method.name for method in methods]
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        default = getattr(type(config)(), item.name)
        if getattr(config, item.name) == default:
            continue
        without = dataclasses.replace(config, **{item.name: default})  # type: ignore[type-var]
        if all(settings_of(method, without) == settings_of(method, config) for method in methods):
            key = f"{section}.{key_of(item.name)}"
            yield (
                key,
                f"has no effect here: none of train.methods {names} reads it; add a method that "
                f"does, or leave {key} out",
            )
