"""What a preference training needs besides a targets' training: its start, pairs, reference."""

from __future__ import annotations

import dataclasses

from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.weights import load_training_weights
from ilrec_dist.objective.objective import Objective
from ilrec_dist.objective.preference import PreferenceObjective
from ilrec_dist.objective.registry import Method
from ilrec_dist.pipeline.artifacts import RunArtifacts, build_backbone, empty_backbone
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.negatives import UniformNegatives
from ilrec_dist.samples.preference_pairs import PreferenceBatchMaker
from ilrec_dist.samples.windows import training_windows
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.reference import known_of_targets
from ilrec_dist.training.spec import TrainingSpec

# The learning rate of a preference training that names none, relative to train.learning_rate.
LEARNING_RATE_SHARE = 0.1


def training_settings(config: Config, method: Method) -> TrainConfig:
    """The section `train` as the method follows it: its own epochs and learning rate."""
    if method.samples == "targets":
        return config.train
    own, train = method.preference(config.preference), config.train
    return dataclasses.replace(
        train,
        epochs=own.epochs or train.epochs,
        learning_rate=own.learning_rate or LEARNING_RATE_SHARE * train.learning_rate,
    )


def first_weights(config: Config, artifacts: RunArtifacts, method: Method, seed: int) -> Backbone:
    """The backbone as the method's training begins.

    Freshly made, or with the best weights of the method that this one starts from.
    """
    if method.starts_from is None:
        return build_backbone(config, artifacts, seed)
    weights = artifacts.folders.training(method.starts_from, seed) / BEST
    return load_training_weights(empty_backbone(config, artifacts, seed), weights)


def batch_maker(
    config: Config,
    artifacts: RunArtifacts,
    method: Method,
    spec: TrainingSpec,
    objective: Objective,
    parallel: ParallelState,
) -> BatchMaker:
    """What makes the method's batches; with the reference's log-probabilities where it reads them.

    `objective` has the weights that the training begins with. Collective over all ranks.
    """
    dataset, catalogue, trie = artifacts.training, artifacts.catalogue, artifacts.trie
    windows = training_windows(dataset, config.train.max_history, config.train.targets)
    if method.samples == "targets":
        return BatchMaker(dataset, catalogue, trie, windows)
    own = method.preference(config.preference)
    negatives = UniformNegatives(dataset, trie, own.negatives, spec.seed)
    maker = PreferenceBatchMaker(dataset, catalogue, trie, windows, negatives)
    if method.needs_reference and len(windows):
        assert isinstance(objective, PreferenceObjective)
        per_rank = config.train.batch_size // (parallel.dp * config.train.accumulation_steps)
        maker.known = known_of_targets(
            objective.to(parallel.device),
            maker,
            spec.folder,
            "reference",
            spec.fingerprint,
            per_rank,
            parallel,
        )
    return maker
