"""The run's backbone, as worker processes build it."""

from __future__ import annotations

import torch

from ilrec_dist.config.tree import Config
from ilrec_dist.items.language_model import title_counts
from ilrec_dist.model import build
from ilrec_dist.model.decoder import max_positions
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import CheckpointPlan, plan_checkpoint
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.partial import separate_rows, train_partially
from ilrec_dist.pipeline.artifacts import RunArtifacts, item_titles, longest_input


def initial_backbone(config: Config, artifacts: RunArtifacts, seed: int) -> Backbone:
    """The run's backbone as its training begins:
    freshly initialised, or with a model's weights.

    The model's folder is the one in `backbone.from`.
    """
    source = config.backbone.from_
    if source is None:
        return _from_scratch(config, artifacts, seed, initialize=True)
    backbone = _unfilled(config, artifacts, seed)
    vocabulary, counts = artifacts.catalogue.vocabulary, None
    if config.backbone.new_tokens == "text":
        counts = title_counts(artifacts.language_model, artifacts.catalogue, item_titles(artifacts))
    build.load_pretrained(backbone, source, NewRows(*vocabulary.added_tokens, counts))
    _choose_trained(config, artifacts, backbone)
    return backbone


def empty_backbone(config: Config, artifacts: RunArtifacts, seed: int) -> Backbone:
    """The run's backbone for trained weights:
    its own are undefined until those are loaded.

    Where a training left most of a model's weights as they are, they are read from
    `backbone.from`.
    """
    if config.backbone.from_ is None:
        return _from_scratch(config, artifacts, seed, initialize=False)
    backbone = _unfilled(config, artifacts, seed)
    if config.train.trainable != "full":
        build.load_pretrained(backbone, config.backbone.from_)
    _choose_trained(config, artifacts, backbone)
    return backbone


def shapes_of_backbone(
    config: Config, artifacts: RunArtifacts, seed: int
) -> tuple[Backbone, CheckpointPlan | None]:
    """As `empty_backbone`, but without values, which takes no memory.

    Also returns where the pretrained weights are, where a training left most of them.
    """
    plan = None
    with torch.device("meta"):
        if config.backbone.from_ is None:
            return _from_scratch(config, artifacts, seed, initialize=False), None
        backbone = _unfilled(config, artifacts, seed)
    if config.train.trainable != "full":
        plan = plan_checkpoint(backbone, config.backbone.from_)
    _choose_trained(config, artifacts, backbone)
    return backbone, plan


def _unfilled(config: Config, artifacts: RunArtifacts, seed: int) -> Backbone:
    return build.build_pretrained(
        config.backbone,
        read_config(artifacts.language_model),
        artifacts.catalogue.vocab_size,
        longest_input(config, artifacts.catalogue),
        config.train.precision,
        seed,
    )


def _choose_trained(config: Config, artifacts: RunArtifacts, backbone: Backbone) -> None:
    """Freeze what is not trained, and attach what `train.trainable` asks for."""
    train, source = config.train, config.backbone.from_
    added = artifacts.catalogue.vocabulary.added_tokens
    if train.trainable != "full":
        assert source is not None
        train_partially(backbone, train.trainable, train.lora, source, added, backbone.seed)
    elif train.new_rows_learning_rate is not None:
        separate_rows(backbone, added)


def _from_scratch(config: Config, artifacts: RunArtifacts, seed: int, initialize: bool) -> Backbone:
    catalogue = artifacts.catalogue
    return build.build_backbone(
        config.backbone,
        catalogue.vocab_size,
        max_positions(config.train.max_history, catalogue.depth),
        config.train.precision,
        seed,
        initialize,
    )
