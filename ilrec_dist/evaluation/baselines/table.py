"""The table of baselines. A further baseline is one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ilrec_dist.cf.sasrec.checkpoint import load_cf
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.synthetic.generate import bayes_scores
from ilrec_dist.evaluation.baselines.counting import (
    TrainingCounts,
    count_training,
    popularity_scores,
    transition_scores,
)
from ilrec_dist.evaluation.baselines.fit import load_baseline, sequence_scores
from ilrec_dist.evaluation.baselines.sasrec import sasrec_scores
from ilrec_dist.evaluation.baselines.sequence_models import MODELS
from ilrec_dist.evaluation.log_probabilities import (
    LogP,
    log_of_counts,
    log_of_probabilities,
    log_softmax,
)

# Maps users int64 [n] to scores float [n, num_items].
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class BaselineInputs:
    """What a baseline may read: the data, the
    split, and the folders of earlier stages.
    """

    dataset: InteractionDataset
    split: str
    cf_folder: str | Path | None = None
    data_folder: str | Path | None = None
    # By name, the folders of sequence models.
    trained: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def counts(self) -> TrainingCounts:
        """The training split, counted once."""
        return count_training(self.dataset)


def _popularity(inputs: BaselineInputs) -> Scorer:
    return lambda users: popularity_scores(inputs.counts, users)


def _transitions(inputs: BaselineInputs) -> Scorer:
    return lambda users: transition_scores(inputs.counts, inputs.dataset, users, inputs.split)


def _sasrec(inputs: BaselineInputs) -> Scorer:
    if inputs.cf_folder is None:
        raise ValueError("the baseline sasrec needs cf_folder")
    model = load_cf(inputs.cf_folder)
    return lambda users: sasrec_scores(model, inputs.dataset, users, inputs.split)


def _bayes(inputs: BaselineInputs) -> Scorer:
    folder = inputs.data_folder
    if folder is None:
        raise ValueError("the baseline bayes needs data_folder, that of synthetic data")
    return lambda users: bayes_scores(folder, inputs.dataset, users, inputs.split)


def _sequence_model(name: str) -> Callable[[BaselineInputs], Scorer]:
    def make_scorer(inputs: BaselineInputs) -> Scorer:
        if name not in inputs.trained:
            raise ValueError(f"the baseline {name} needs its folder in `trained`")
        model, max_history = load_baseline(inputs.trained[name])
        return lambda users: sequence_scores(
            model, inputs.dataset, users, inputs.split, max_history
        )

    return make_scorer


@dataclass(frozen=True)
class Baseline:
    """One baseline of the table of results."""

    name: str
    make_scorer: Callable[[BaselineInputs], Scorer]
    # Makes log p of items of its scores; the order of the items is that of the scores.
    log_p: LogP
    # Knows the true distribution of synthetic data, so it is a bound and no competitor.
    is_bound: bool = False
    # Is trained, with the seed of the section `cf`.
    is_cf: bool = False
    # Stands in the table only where evaluation.baselines names it.
    is_optional: bool = False


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline("popularity", _popularity, log_of_counts),
        Baseline("transitions", _transitions, log_of_counts),
        Baseline("sasrec", _sasrec, log_softmax, is_cf=True),
        *(
            Baseline(name, _sequence_model(name), log_softmax, is_cf=True, is_optional=True)
            for name in MODELS
        ),
        Baseline("bayes", _bayes, log_of_probabilities, is_bound=True),
    )
}


def baselines_of(data_format: str, wanted: Sequence[str] = ()) -> list[Baseline]:
    """The baselines of a run, in the order of its table.

    Bounds need synthetic data; optional ones are those `wanted`.
    """
    return [
        baseline
        for baseline in BASELINES.values()
        if (data_format == "synthetic" or not baseline.is_bound)
        and (baseline.name in wanted or not baseline.is_optional)
    ]
