"""Ranks with what was trained, in every worker process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ilrec_dist.cf.sasrec.checkpoint import load_cf
from ilrec_dist.common.files import read_json_object, write_json
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState, from_rank0, is_rank0
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.fusion_ranking import (
    FusedModel,
    FusionSource,
    cf_source,
    transitions_source,
)
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.weights import load_training_weights
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import empty_backbone
from ilrec_dist.pipeline.prompting import input_form, served_prompt
from ilrec_dist.pipeline.rankings import RankingsCounter, is_ranked, rank_in_parts
from ilrec_dist.pipeline.stages.evaluate import (
    FUSION_SUFFIX,
    fused_name,
    fusions,
    predictions_file,
    treatments,
)

# What a fusion may mix with the language model.
FUSION_SOURCES: dict[str, Callable[[RunArtifacts], FusionSource]] = {
    "cf": lambda artifacts: cf_source(load_cf(artifacts.folders.cf)),
    "transitions": lambda artifacts: transitions_source(count_training(artifacts.dataset)),
}


def evaluate_trained(config: Config, artifacts: RunArtifacts, parallel: ParallelState) -> None:
    """Beam search with the best weights of every
    trained (method, seed), on the test split.

    Runs in every worker. Predictions that an interrupted evaluation
    saved are not made again, nor are parts of them.
    """
    users = artifacts.dataset.evaluated("test")
    inputs = input_form(config, artifacts, served_prompt(config))
    work = list(itertools.product(config.train.methods, config.train.seeds, treatments(config)))

    def rank(number: int, path: Path, method: str, seed: int, exclude: bool) -> None:
        evaluated = partial(
            evaluate_model,
            _best(config, artifacts, parallel, method, seed),
            artifacts.dataset,
            artifacts.catalogue,
            artifacts.trie,
            split="test",
            config=dataclasses.replace(config.evaluation, exclude_seen=exclude),
            softmax_scope=get_method(method).objective(config.objective).softmax_scope,
            inputs=inputs,
            parallel=parallel,
            model_name=str(artifacts.folders.training(method, seed) / BEST),
        )
        before, total = number * len(users), len(work) * len(users)
        counter = RankingsCounter(artifacts, "evaluate", method, before, total, parallel.dp)
        rank_in_parts(path, users, evaluated, counter)

    for number, (method, seed, exclude) in enumerate(work):
        path = predictions_file(config, method, seed, exclude)
        if not is_ranked(path):
            # One model is let go before the next is loaded.
            rank(number, path, method, seed, exclude)
    if config.evaluation.fusion:
        evaluate_fusions(config, artifacts, parallel)


def evaluate_fusions(config: Config, artifacts: RunArtifacts, parallel: ParallelState) -> None:
    """Mixtures of every trained (method, seed),
    with weights chosen on validation users.

    Each is saved like a method's predictions, with its weights
    in a .fusion.json beside them, which is written first.
    """
    sources = {name: make(artifacts) for name, make in FUSION_SOURCES.items()}
    inputs = input_form(config, artifacts, served_prompt(config))
    users = artifacts.dataset.evaluated("test")
    methods, seeds = config.train.methods, config.train.seeds
    work = list(itertools.product(methods, seeds, treatments(config), fusions(config)))

    def rank(
        number: int, path: Path, method: str, seed: int, exclude: bool, names: Sequence[str]
    ) -> None:
        model = FusedModel(
            _best(config, artifacts, parallel, method, seed),
            artifacts.dataset,
            artifacts.trie,
            [sources[name] for name in names],
            config=dataclasses.replace(config.evaluation, exclude_seen=exclude),
            softmax_scope=get_method(method).objective(config.objective).softmax_scope,
            inputs=inputs,
            parallel=parallel,
            model_name=str(artifacts.folders.training(method, seed) / BEST),
        )
        weights = _fusion_weights(config, artifacts, model, path, [method, *names])
        before, total = number * len(users), len(work) * len(users)
        title = fused_name(method, names)
        counter = RankingsCounter(artifacts, "fusions", title, before, total, parallel.dp)
        rank_in_parts(path, users, partial(model.predictions, weights), counter)

    for number, (method, seed, exclude, names) in enumerate(work):
        path = predictions_file(config, fused_name(method, names), seed, exclude)
        if not is_ranked(path):
            rank(number, path, method, seed, exclude, names)


def _fusion_weights(
    config: Config, artifacts: RunArtifacts, model: FusedModel, path: Path, names: Sequence[str]
) -> np.ndarray:
    """The weights of `names`, from the file beside the
    fusion's predictions, or chosen and written there.
    """
    file = path.with_suffix(FUSION_SUFFIX)
    # All parts are of the same weights, whatever layout an interrupted evaluation had.
    saved = from_rank0(read_json_object(file) if is_rank0() and file.exists() else None)
    if saved is None:
        users = artifacts.validation_users(config.train.validation_users)
        weights, ndcg = model.choose_weights(users)
        saved = {
            "weights": dict(zip(names, weights.tolist(), strict=True)),
            "validation_ndcg@10": ndcg,
            "exclude_seen": model.config.exclude_seen,
            "beam": model.config.beam,
            "candidates": model.config.fusion_candidates,
        }
        if is_rank0():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, saved)
    return np.array([saved["weights"][name] for name in names])


def _best(
    config: Config, artifacts: RunArtifacts, parallel: ParallelState, method: str, seed: int
) -> Backbone:
    """The model with the best weights of a training, on this rank's device."""
    weights = artifacts.folders.training(method, seed) / BEST
    backbone = load_training_weights(empty_backbone(config, artifacts, seed), weights)
    return backbone.to(parallel.device)
