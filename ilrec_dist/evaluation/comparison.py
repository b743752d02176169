"""Methods against each other over the same users: paired bootstrap intervals (METHOD.md
§9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ilrec_dist.evaluation.metrics import paired_bootstrap
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.reporting.results import Interval

COMPARED_METRICS = ("ndcg@10", "hit@10")


@dataclass(frozen=True)
class MethodFigures:
    """One method with one seed under one treatment of seen items."""

    method: str
    exclude_seen: bool
    # The row of results.json.
    row: dict[str, Any]
    # float64 [n] of each of COMPARED_METRICS, by user.
    per_user: dict[str, np.ndarray]

    @staticmethod
    def of(
        predictions: Predictions,
        method: str,
        seed: int,
        more: Mapping[str, float] | None = None,
    ) -> MethodFigures:
        """The figures of one predictions file; `more` are further keys of its row."""
        values = predictions.per_user()
        return MethodFigures(
            method,
            predictions.exclude_seen,
            predictions.row(method, seed) | dict(more or {}),
            {metric: values[metric] for metric in COMPARED_METRICS},
        )


def paired_intervals(
    figures: Sequence[MethodFigures], compared_with: Mapping[str, Sequence[str]]
) -> list[Interval]:
    """Intervals of each method minus those that it is compared with.

    `compared_with` maps a method to its baselines; those without
    figures are skipped. Every treatment of seen items that occurs
    gets its intervals. A user's value is the mean over seeds.
    """
    values: dict[tuple[str, bool, str], list[np.ndarray]] = {}
    for entry in figures:
        for metric, per_user in entry.per_user.items():
            values.setdefault((entry.method, entry.exclude_seen, metric), []).append(per_user)
    means = {key: np.mean(arrays, axis=0) for key, arrays in values.items()}
    return [
        Interval(
            method,
            versus,
            metric,
            *paired_bootstrap(
                means[method, exclude_seen, metric], means[versus, exclude_seen, metric]
            ),
            exclude_seen=exclude_seen,
        )
        for exclude_seen in dict.fromkeys(entry.exclude_seen for entry in figures)
        for method, baselines in compared_with.items()
        for versus in baselines
        for metric in COMPARED_METRICS
        if (method, exclude_seen, metric) in means and (versus, exclude_seen, metric) in means
    ]
