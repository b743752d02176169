"""Ranks with what was trained, in every worker process."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch.distributed as dist

from ilrec_dist.cf.sasrec.checkpoint import load_cf
from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.fusion_ranking import (
    FusionSource,
    cf_source,
    fuse_model,
    transitions_source,
)
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.model.weights import load_training_weights
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import empty_backbone
from ilrec_dist.pipeline.prompting import input_form, served_prompt
from ilrec_dist.pipeline.rankings import rankings_counter
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

    Runs in every worker. Predictions that an
    interrupted evaluation saved are not made again.
    """
    users = artifacts.dataset.evaluated("test")
    inputs = input_form(config, artifacts, served_prompt(config))
    is_rank0 = dist.get_rank() == 0
    work = [
        (method, seed, exclude)
        for method in config.train.methods
        for seed in config.train.seeds
        for exclude in treatments(config)
    ]
    for number, (method, seed, exclude) in enumerate(work):
        path = predictions_file(config, method, seed, exclude)
        # No rank gets here before all have finished the one before, so all see the same files.
        if path.exists():
            continue
        weights = artifacts.folders.training(method, seed) / BEST
        backbone = load_training_weights(empty_backbone(config, artifacts, seed), weights)
        before, total = number * len(users), len(work) * len(users)
        predictions = evaluate_model(
            backbone.to(parallel.device),
            artifacts.dataset,
            artifacts.catalogue,
            artifacts.trie,
            users=users,
            split="test",
            config=dataclasses.replace(config.evaluation, exclude_seen=exclude),
            softmax_scope=get_method(method).objective(config.objective).softmax_scope,
            inputs=inputs,
            parallel=parallel,
            progress=rankings_counter(artifacts, "evaluate", method, before, total, parallel.dp),
            model_name=str(weights),
        )
        if is_rank0:
            path.parent.mkdir(parents=True, exist_ok=True)
            predictions.save(path)
    if config.evaluation.fusion:
        evaluate_fusions(config, artifacts, parallel)


def evaluate_fusions(config: Config, artifacts: RunArtifacts, parallel: ParallelState) -> None:
    """Mixtures of every trained (method, seed),
    with weights chosen on validation users.

    Each is saved like a method's predictions, with
    its weights in a .fusion.json beside them.
    """
    sources = {name: make(artifacts) for name, make in FUSION_SOURCES.items()}
    inputs = input_form(config, artifacts, served_prompt(config))
    work = itertools.product(
        config.train.methods, config.train.seeds, treatments(config), fusions(config)
    )
    for method, seed, exclude, names in work:
        path = predictions_file(config, fused_name(method, names), seed, exclude)
        # All ranks look before one of them writes.
        exists = path.exists()
        dist.barrier()
        if exists:
            continue
        weights_file = artifacts.folders.training(method, seed) / BEST
        backbone = load_training_weights(empty_backbone(config, artifacts, seed), weights_file)
        fusion = fuse_model(
            backbone.to(parallel.device),
            artifacts.dataset,
            artifacts.trie,
            [sources[name] for name in names],
            validation_users=artifacts.validation_users(config.train.validation_users),
            test_users=artifacts.dataset.evaluated("test"),
            config=dataclasses.replace(config.evaluation, exclude_seen=exclude),
            softmax_scope=get_method(method).objective(config.objective).softmax_scope,
            inputs=inputs,
            parallel=parallel,
            model_name=str(weights_file),
        )
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                path.with_suffix(FUSION_SUFFIX),
                {
                    "weights": dict(zip([method, *names], fusion.weights.tolist(), strict=True)),
                    "validation_ndcg@10": fusion.validation_ndcg,
                    "exclude_seen": exclude,
                    "beam": config.evaluation.beam,
                    "candidates": config.evaluation.fusion_candidates,
                },
            )
            fusion.predictions.save(path)
