"""The evaluate stage: which predictions there are, where
they lie, and the figures of the report made from them.

The workers make them (`worker_tasks.train_and_evaluate`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation import comparison, examples
from ilrec_dist.evaluation.baselines.counting import count_training
from ilrec_dist.evaluation.baselines.table import BASELINES, Baseline, baselines_of
from ilrec_dist.evaluation.beyond_accuracy import ItemFacts, beyond_accuracy
from ilrec_dist.evaluation.comparison import MethodFigures
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.objective.registry import METHODS, get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.stage import Stage
from ilrec_dist.pipeline.stages.baselines import baseline_stage
from ilrec_dist.pipeline.training_cost import training_costs
from ilrec_dist.reporting.html.examples import Example
from ilrec_dist.reporting.results import TRAINING_FLOPS, Interval, MethodLabel

# Sources of each fusion besides the language model, the widest last.
FUSIONS = (("cf",), ("cf", "transitions"))
# Ends the name of the file beside a fusion's predictions that has its weights.
FUSION_SUFFIX = ".fusion.json"


def evaluate_stage(config: Config, trainings: Sequence[str]) -> Stage:
    wanted = config.evaluation.baselines
    return Stage(
        "evaluate",
        "evaluate",
        after=("prepare", "cf", *(baseline_stage(name) for name in wanted), *trainings),
        settings=stage_settings(config, "evaluate"),
        output=RunFolders(config.run_dir).evaluation,
    )


def treatments(config: Config) -> list[bool]:
    """exclude_seen as configured first, then the other one (METHOD.md §9)."""
    return [config.evaluation.exclude_seen, not config.evaluation.exclude_seen]


def predictions_file(config: Config, method: str, seed: int | None, exclude_seen: bool) -> Path:
    """Where the predictions of a method are saved; baselines have no training seed."""
    folder = method if seed is None else f"{method}-seed{seed}"
    name = (
        "predictions.parquet"
        if exclude_seen == config.evaluation.exclude_seen
        else f"predictions-seen-{'excluded' if exclude_seen else 'kept'}.parquet"
    )
    return RunFolders(config.run_dir).evaluation / folder / name


def weights_file(predictions: Path) -> Path:
    """Where the weights of a fusion with these predictions are saved."""
    return predictions.with_suffix(FUSION_SUFFIX)


def baselines_in(config: Config) -> list[Baseline]:
    """The baselines of the run's table."""
    return baselines_of(config.data.format, config.evaluation.baselines)


def evaluated(config: Config) -> Iterator[tuple[str, int | None]]:
    """Every (method, training seed) of the table of results; None for baselines."""
    yield from ((baseline.name, None) for baseline in baselines_in(config))
    for method in config.train.methods:
        names = [method, *(fused_name(method, sources) for sources in fusions(config))]
        yield from ((name, seed) for name in names for seed in config.train.seeds)


def fusions(config: Config) -> tuple[tuple[str, ...], ...]:
    """The sources that each trained model is mixed
    with, one fusion an entry (METHOD.md §12).
    """
    return FUSIONS if config.evaluation.fusion else ()


def fused_name(method: str, sources: Sequence[str]) -> str:
    return "+".join([method, *sources])


def collect_figures(config: Config, artifacts: RunArtifacts) -> list[MethodFigures]:
    """The figures of every method, seed and treatment, from the saved predictions."""
    popularity = count_training(artifacts.dataset).popularity
    facts = ItemFacts.of(popularity, artifacts.catalogue)
    costs = training_costs(config, artifacts)
    collected = []
    for exclude in treatments(config):
        for method, seed in evaluated(config):
            predictions = Predictions.load(predictions_file(config, method, seed, exclude))
            is_cf = method in BASELINES and BASELINES[method].is_cf
            more = beyond_accuracy(predictions, facts, scores_are_of_codes=method in METHODS)
            if (method, seed) in costs:
                more[TRAINING_FLOPS] = costs[method, seed]
            collected.append(
                MethodFigures.of(predictions, method, config.cf.seed if is_cf else seed or 0, more)
            )
    return collected


def paired_intervals(config: Config, figures: Sequence[MethodFigures]) -> list[Interval]:
    """Paired intervals of each trained method, under both treatments of seen items."""
    compared_with = {method: get_method(method).compared_with for method in config.train.methods}
    for method, sources in itertools.product(config.train.methods, fusions(config)):
        compared_with[fused_name(method, sources)] = (method, "sasrec", "transitions")
    return comparison.paired_intervals(figures, compared_with)


def method_labels() -> list[MethodLabel]:
    """Baselines, then methods, then bounds: the order of every table."""
    baselines = [
        MethodLabel(baseline.name, baseline.name, is_bound=baseline.is_bound)
        for baseline in BASELINES.values()
    ]
    methods = []
    for method in METHODS.values():
        methods.append(MethodLabel(method.name, method.title, highlighted=method.highlighted))
        for sources in FUSIONS:
            name = fused_name(method.name, sources)
            methods.append(MethodLabel(name, fused_name(method.title, sources)))
    return sorted([*baselines, *methods], key=lambda label: label.is_bound)


def collect_examples(config: Config, artifacts: RunArtifacts) -> list[Example]:
    """A few users with what each trained method recommends, by its first seed."""
    predictions = {
        method: Predictions.load(
            predictions_file(config, method, config.train.seeds[0], config.evaluation.exclude_seen)
        )
        for method in config.train.methods
    }
    return examples.collect_examples(artifacts.dataset, predictions, config.evaluation.examples)
