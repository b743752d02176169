"""Ranks with what was trained, in every worker process."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.cf.sasrec.checkpoint import load_cf
from ilrec_dist.common.files import read_json_object, write_json
from ilrec_dist.common.manifest import with_checksum
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState, from_rank0, is_rank0
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.fusion_ranking import (
    Fusions,
    FusionSource,
    Mixture,
    cf_source,
    transitions_source,
)
from ilrec_dist.evaluation.ranking import evaluate_treatments
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.model.weights import load_training_weights
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import empty_backbone
from ilrec_dist.pipeline.made_with import WEIGHTS_MADE_WITH
from ilrec_dist.pipeline.prompting import input_form, served_prompt
from ilrec_dist.pipeline.rankers import evaluation_ranker
from ilrec_dist.pipeline.rankings import (
    RankingsCounter,
    is_ranked,
    parts_folder,
    rank_in_parts,
)
from ilrec_dist.pipeline.stages.evaluate import (
    fused_name,
    fusions,
    predictions_file,
    treatments,
    weights_file,
)

# Where the predictions of each fusion lie, by exclude_seen and the names of its sources.
Paths = Mapping[tuple[bool, tuple[str, ...]], Path]
# What a fusion may mix with the language model.
FUSION_SOURCES: dict[str, Callable[[RunArtifacts], FusionSource]] = {
    "cf": lambda artifacts: cf_source(load_cf(artifacts.folders.cf)),
    "transitions": lambda artifacts: transitions_source(count_training(artifacts.dataset)),
}


def evaluate_trained(
    config: Config,
    artifacts: RunArtifacts,
    parallel: ParallelState,
    made_with: Mapping[Path, str],
) -> None:
    """Beam search with the best weights of every
    trained (method, seed), on the test split.

    Both treatments of seen items go on from the same reading of the users' histories.
    Runs in every worker. Predictions that are there are not made again, nor
    are parts of them. made_with: what `keep_valid` returned.
    """
    users = artifacts.test_users(config.evaluation.users)
    work = list(itertools.product(config.train.methods, config.train.seeds))

    def rank(number: int, paths: Mapping[bool, Path], method: str, seed: int) -> None:
        evaluated = partial(
            evaluate_treatments,
            _ranker(config, artifacts, parallel, method, seed),
            artifacts.dataset,
            list(paths),
            split="test",
        )
        counter = RankingsCounter(
            artifacts, "evaluate", method, number * len(users), len(work) * len(users)
        )
        texts = {path: made_with[path] for path in paths.values()}
        rank_in_parts(texts, users, evaluated, counter)

    for number, (method, seed) in enumerate(work):
        paths = {
            exclude: predictions_file(config, method, seed, exclude)
            for exclude in treatments(config)
        }
        missing = {exclude: path for exclude, path in paths.items() if not is_ranked(path)}
        if missing:
            # One model is let go before the next is loaded.
            rank(number, missing, method, seed)
    if config.evaluation.fusion:
        evaluate_fusions(config, artifacts, parallel, made_with)


def evaluate_fusions(
    config: Config,
    artifacts: RunArtifacts,
    parallel: ParallelState,
    made_with: Mapping[Path, str],
) -> None:
    """Mixtures of every trained (method, seed),
    with weights chosen on validation users.

    Those of a model are made of the same scores, with seen items and without. Each
    is saved like a method's predictions, with its weights in a .fusion.json beside
    them, which is written first.
    """
    sources = {name: make(artifacts) for name, make in FUSION_SOURCES.items()}
    validation = artifacts.validation_users(config.train.validation_users)
    users = artifacts.test_users(config.evaluation.users)
    work = list(itertools.product(config.train.methods, config.train.seeds))
    per_model = len(validation) + len(users)

    def rank(number: int, paths: Paths, method: str, seed: int) -> None:
        names = list(dict.fromkeys(itertools.chain.from_iterable(of for _, of in paths)))
        fused = Fusions(
            _ranker(config, artifacts, parallel, method, seed),
            artifacts.dataset,
            [sources[name] for name in names],
            [Mixture(exclude, [0, *(1 + names.index(n) for n in of)]) for exclude, of in paths],
            num_candidates=config.evaluation.fusion_candidates,
        )
        before, total = number * per_model, len(work) * per_model
        counter = RankingsCounter(artifacts, "fusions", f"{method}, weights", before, total)
        texts = {path: made_with[path] for path in paths.values()}
        weights = _fusion_weights(method, paths, texts, fused, validation, counter)
        counter = RankingsCounter(artifacts, "fusions", method, before + len(validation), total)
        rank_in_parts(texts, users, partial(fused.predictions, weights), counter)

    for number, (method, seed) in enumerate(work):
        paths = {
            (exclude, names): predictions_file(config, fused_name(method, names), seed, exclude)
            for exclude in treatments(config)
            for names in fusions(config)
        }
        missing = {
            mixed: path for mixed, path in paths.items() if not is_ranked(path, weights_file(path))
        }
        if missing:
            rank(number, missing, method, seed)


def _fusion_weights(
    method: str,
    paths: Paths,
    made_with: Mapping[Path, str],
    fused: Fusions,
    users: np.ndarray,
    counter: RankingsCounter,
) -> list[np.ndarray]:
    """The weights of each fusion, from the files beside their
    predictions, or chosen by these users and written there.
    """
    files = [weights_file(path) for path in paths.values()]
    # All parts are of the same weights, whatever layout an interrupted evaluation had.
    saved: list[dict[str, Any]] | None = from_rank0(
        [read_json_object(file) for file in files]
        if is_rank0() and all(file.exists() for file in files)
        else None
    )
    names = [(method, *of) for _, of in paths]
    if saved is None:
        chosen = fused.choose_weights(users, counter.of(len(users)))
        saved = [
            {
                WEIGHTS_MADE_WITH: made_with[path],
                "weights": dict(zip(of, weights.tolist(), strict=True)),
                "validation_ndcg@10": ndcg,
                "exclude_seen": exclude,
                "beam": fused.model.beam,
                "candidates": fused.num_candidates,
            }
            for (exclude, _), path, of, (weights, ndcg) in zip(
                paths, paths.values(), names, chosen, strict=True
            )
        ]
        if is_rank0():
            for path, content in zip(paths.values(), saved, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Parts of other weights, where the file of these was lost.
                shutil.rmtree(parts_folder(path), ignore_errors=True)
                write_json(weights_file(path), with_checksum(content))
    return [
        np.array([content["weights"][name] for name in of])
        for of, content in zip(names, saved, strict=True)
    ]


def _ranker(
    config: Config, artifacts: RunArtifacts, parallel: ParallelState, method: str, seed: int
) -> ModelRanker:
    """Ranks with the best weights of a training, on this rank's device."""
    weights = artifacts.folders.training(method, seed) / BEST
    backbone = load_training_weights(empty_backbone(config, artifacts, seed), weights)
    return evaluation_ranker(
        config,
        artifacts,
        backbone.to(parallel.device),
        softmax_scope=get_method(method).objective(config.objective).softmax_scope,
        inputs=input_form(config, artifacts, served_prompt(config)),
        parallel=parallel,
        model_name=str(weights),
    )
