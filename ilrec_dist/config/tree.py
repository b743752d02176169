"""The root of the configuration tree, and the checks that need more than one key."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.common.config_fields import section
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.training.config import TrainConfig


class ConfigError(UserError):
    """A key, a type or a value that the tree does not take; names the key, what was expected and the nearest key."""


@section
class Config:
    name: Annotated[str, MinLen(1)] = "run"
    runs_dir: str = "runs"  # the run's folder is runs_dir/name
    data: DataConfig = field(default_factory=DataConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    cf: CFConfig = field(default_factory=CFConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def check_together(config: Config, source: str) -> None:
    """What no single key shows: values that are impossible only together."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{source}: key {key!r}: {why}")

    backbone, objective, launch, train = (
        config.backbone,
        config.objective,
        config.launch,
        config.train,
    )
    if Path(config.name).name != config.name:
        refuse(
            "name",
            f"expected the name of a folder, found {config.name!r}; runs_dir says where it lies",
        )
    if config.data.format != "synthetic" and config.data.path is None:
        refuse("data.path", f"data.format {config.data.format!r} needs the path of the data")
    if abs(sum(config.data.split_ratio) - 1) > 1e-6:
        refuse(
            "data.split_ratio",
            f"the shares {config.data.split_ratio} add up to {sum(config.data.split_ratio):g}, expected 1",
        )
    if backbone.hidden_size % backbone.num_heads:
        refuse(
            "backbone.num_heads",
            f"{backbone.num_heads} heads do not divide backbone.hidden_size {backbone.hidden_size}",
        )
    kv_heads = backbone.num_kv_heads or backbone.num_heads
    if backbone.num_heads % kv_heads:
        refuse(
            "backbone.num_kv_heads",
            f"{kv_heads} key/value heads do not divide backbone.num_heads {backbone.num_heads}",
        )
    if launch.workers % launch.tp:
        refuse(
            "launch.workers",
            f"a world size of {launch.workers} is not a multiple of launch.tp {launch.tp}; choose workers = tp × data-parallel copies",
        )
    if kv_heads % launch.tp:
        refuse(
            "launch.tp",
            f"tp {launch.tp} does not divide the {kv_heads} attention (key/value) heads of the backbone; choose a tp that does",
        )
    if backbone.vocab_multiple % launch.tp:
        refuse(
            "launch.tp",
            f"tp {launch.tp} does not divide the vocabulary, padded to a multiple of backbone.vocab_multiple {backbone.vocab_multiple}",
        )
    ffn = backbone.ffn_hidden_size or 4 * backbone.hidden_size
    if ffn % launch.tp:
        refuse("launch.tp", f"tp {launch.tp} does not divide the feed-forward width {ffn}")
    if (
        objective.num_intermediate_layers is not None
        and objective.num_intermediate_layers >= backbone.num_layers
    ):
        refuse(
            "objective.num_intermediate_layers",
            f"{objective.num_intermediate_layers} must be below backbone.num_layers {backbone.num_layers}",
        )
    if backbone.num_layers < 2 and "ilrec" in train.methods:
        refuse("backbone.num_layers", "ilrec needs at least 2 layers, one of them intermediate")
    if train.batch_size % (launch.dp * train.accumulation_steps):
        refuse(
            "train.batch_size",
            f"{train.batch_size} must be a multiple of launch.dp × train.accumulation_steps = {launch.dp * train.accumulation_steps}",
        )
    if config.cf.hidden_size % config.cf.num_heads:
        refuse(
            "cf.num_heads",
            f"{config.cf.num_heads} heads do not divide cf.hidden_size {config.cf.hidden_size}",
        )
    if config.cf.rewards == "actor" and launch.engine != "ray":
        refuse(
            "cf.rewards",
            "the reward actor needs launch.engine ray; with torchrun choose in_process",
        )
    if len(set(train.seeds)) != len(train.seeds):
        refuse("train.seeds", f"expected distinct seeds, found {train.seeds}")
    if len(set(train.methods)) != len(train.methods):
        refuse("train.methods", f"expected distinct methods, found {train.methods}")
    codes = config.items.codes_per_level
    if config.items.form == "semantic" and config.items.index is None and codes & (codes - 1):
        refuse(
            "items.codes_per_level",
            f"expected a power of two, found {codes}; try {1 << (codes.bit_length() - 1)}",
        )
    if config.items.form != "semantic" and config.items.index is not None:
        refuse(
            "items.index",
            f"an index file gives code tuples, which items.form {config.items.form} has none of; leave one of the two out",
        )
    if config.items.form == "titles":
        if config.items.collisions == "resolve":
            refuse(
                "items.collisions",
                "items of one title cannot be told apart by other tokens (items.form titles); expected keep or refuse",
            )
        if train.targets != "last":
            refuse("train.targets", "items.form titles takes one target a sequence; expected last")
