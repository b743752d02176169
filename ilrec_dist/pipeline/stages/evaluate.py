"""The evaluate stage: predictions of the trained models and the baselines, and what the report shows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.run_layout import BEST, COUNTER, RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.evaluation.metrics import paired_bootstrap
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import baseline_predictions, evaluate_model
from ilrec_dist.inference.ranker import RankingProgress
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts, build_backbone, load_weights
from ilrec_dist.pipeline.stage import Stage
from ilrec_dist.reporting.html.report import Example
from ilrec_dist.reporting.progress import stage_progress, write_counter
from ilrec_dist.reporting.results import Interval

EXAMPLE_SEED = 5


def evaluate_stage(config: Config, trainings: Sequence[str]) -> Stage:
    return Stage(
        "evaluate",
        "evaluate",
        after=("prepare", "cf", *trainings),
        settings=stage_settings(config, "evaluate"),
        output=RunFolders(config.run_dir).evaluation,
    )


def baselines(config: Config) -> list[str]:
    names = ["popularity", "transitions", "sasrec"]
    return names + ["bayes"] if config.data.format == "synthetic" else names


def treatments(config: Config) -> list[bool]:
    """exclude_seen as configured first, then the other, which stands beside it (METHOD.md §9)."""
    return [config.evaluation.exclude_seen, not config.evaluation.exclude_seen]


def predictions_file(config: Config, method: str, seed: int | None, exclude_seen: bool) -> Path:
    name = method if seed is None else f"{method}-seed{seed}"
    kept = (
        "predictions.parquet"
        if exclude_seen == config.evaluation.exclude_seen
        else f"predictions-seen-{'excluded' if exclude_seen else 'kept'}.parquet"
    )
    return RunFolders(config.run_dir).evaluation / name / kept


def evaluated(config: Config) -> Iterator[tuple[str, int | None]]:
    """Every (method, training seed) of the table; None for baselines."""
    yield from ((method, None) for method in baselines(config))
    yield from ((method, seed) for method in config.train.methods for seed in config.train.seeds)


def evaluate_baselines(config: Config, artifacts: RunArtifacts) -> None:
    """Full ranking by every baseline on the test split, both with and without the items of the history. In the driver's process."""
    users = artifacts.dataset.evaluated("test")
    work = [(method, exclude) for method in baselines(config) for exclude in treatments(config)]
    with stage_progress("baselines", len(work), "rankings") as bar:
        for done, (method, exclude) in enumerate(work, start=1):
            path = predictions_file(config, method, None, exclude)
            path.parent.mkdir(parents=True, exist_ok=True)
            found = baseline_predictions(
                method,
                artifacts.dataset,
                users=users,
                split="test",
                exclude_seen=exclude,
                cf_folder=artifacts.folders.cf,
                data_folder=artifacts.folders.data,
            )
            found.save(path)
            bar(done, method)


def evaluate_trained(config: Config, artifacts: RunArtifacts, parallel: ParallelState) -> None:
    """Beam search with the best weights of every trained (method, seed), on all users of the test split. Runs in every worker.

    What an interrupted evaluation has saved is not made again.
    """
    users = artifacts.dataset.evaluated("test")
    lead = dist.get_rank() == 0
    work = [
        (method, seed, exclude)
        for method in config.train.methods
        for seed in config.train.seeds
        for exclude in treatments(config)
    ]
    for number, (method, seed, exclude) in enumerate(work):
        path = predictions_file(config, method, seed, exclude)
        if path.exists():  # no rank gets here before all are done with the one before
            continue
        backbone = load_weights(
            build_backbone(config, artifacts, seed), artifacts.folders.training(method, seed) / BEST
        ).to(parallel.device)
        found = evaluate_model(
            backbone,
            artifacts.dataset,
            artifacts.catalogue,
            artifacts.trie,
            users=users,
            split="test",
            config=dataclasses.replace(config.evaluation, exclude_seen=exclude),
            softmax_scope=get_method(method).objective(config.objective).softmax_scope,
            max_history=config.train.max_history,
            parallel=parallel,
            model_name=str(artifacts.folders.training(method, seed) / BEST),
            progress=_counter(artifacts, parallel.dp, number * len(users), len(work) * len(users))
            if lead
            else None,
        )
        if lead:
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
    if lead:
        (artifacts.folders.evaluation / COUNTER).unlink(missing_ok=True)


def _counter(artifacts: RunArtifacts, dp: int, before: int, total: int) -> RankingProgress:
    """Leaves the rankings done so far where the driver looks for them; other data-parallel ranks are taken to be as far."""

    def progress(done: int, mine: int) -> None:
        write_counter(artifacts.folders.evaluation / COUNTER, before + min(done, mine) * dp, total)

    return progress


def collect_rows(config: Config) -> list[dict[str, object]]:
    """The rows of results.json, recomputed from the saved predictions."""
    return [
        Predictions.load(predictions_file(config, method, seed, exclude)).row(
            method, config.cf.seed if method == "sasrec" else seed or 0
        )
        for exclude in treatments(config)
        for method, seed in evaluated(config)
    ]


def paired_intervals(config: Config) -> list[Interval]:
    """Paired bootstrap over users of ilrec minus sft and ilrec minus transitions; each user's figure is the mean over seeds."""
    if "ilrec" not in config.train.methods:
        return []
    exclude = config.evaluation.exclude_seen
    rivals = (["sft"] if "sft" in config.train.methods else []) + ["transitions"]
    intervals = []
    for rival in rivals:
        for metric in ("ndcg@10", "hit@10"):
            ours, theirs = (
                _mean_over_seeds(config, method, metric, exclude) for method in ("ilrec", rival)
            )
            intervals.append(
                Interval(
                    "ilrec", rival, metric, *paired_bootstrap(ours, theirs), exclude_seen=exclude
                )
            )
    return intervals


def collect_examples(config: Config, artifacts: RunArtifacts) -> list[Example]:
    """A few users, drawn with a fixed seed, with history, target and what each trained method recommends."""
    evaluated = artifacts.dataset.evaluated("test")
    users = np.sort(
        evaluated[
            np.random.default_rng(EXAMPLE_SEED).permutation(len(evaluated))[
                : config.evaluation.examples
            ]
        ]
    )
    exclude = config.evaluation.exclude_seen
    found: dict[str, Predictions] = {
        method: Predictions.load(predictions_file(config, method, config.train.seeds[0], exclude))
        for method in config.train.methods
    }
    return [_example(artifacts, int(user), found) for user in users]


def _example(artifacts: RunArtifacts, user: int, found: dict[str, Predictions]) -> Example:
    dataset = artifacts.dataset

    def title(item: int) -> str:
        name = dataset.titles[item] if dataset.titles else ""
        return f"{name} [{dataset.item_ids[item]}]" if name else dataset.item_ids[item]

    sequence = dataset.sequence(user)[
        : int(dataset.target_positions("test", np.array([user]))[0]) + 1
    ]
    methods = {}
    for method, predictions in found.items():
        place = int(np.searchsorted(predictions.users, user))
        listed = zip(predictions.items[place], predictions.scores[place], strict=True)
        methods[method] = [(title(int(item)), float(score)) for item, score in listed if item >= 0][
            :10
        ]
    return Example(
        dataset.user_ids[user],
        [title(int(item)) for item in sequence[:-1]],
        title(int(sequence[-1])),
        methods,
    )


def _mean_over_seeds(config: Config, method: str, metric: str, exclude: bool) -> np.ndarray:
    seeds = config.train.seeds if method in config.train.methods else [None]
    return np.mean(
        [
            Predictions.load(predictions_file(config, method, seed, exclude)).per_user()[metric]
            for seed in seeds
        ],
        axis=0,
    )
