"""Paired intervals between methods: both treatments of seen items, means over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from ilrec_dist.evaluation.comparison import COMPARED_METRICS, MethodFigures, paired_intervals
from ilrec_dist.evaluation.metrics import paired_bootstrap
from ilrec_dist.evaluation.predictions import Predictions

USERS, LENGTH = 300, 12


def predictions(seed: int, exclude_seen: bool) -> Predictions:
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(40)[:LENGTH] for _ in range(USERS)]).astype(np.int32)
    targets = rng.integers(0, 40, USERS)
    return Predictions(
        np.arange(USERS),
        targets,
        items,
        np.zeros((USERS, LENGTH), np.float32),
        np.zeros(USERS, np.int64),
        np.ones(USERS, np.int64),
        exclude_seen,
    )


FILES = {
    (method, seed, exclude): predictions(100 * seed + 10 * number + exclude, exclude)
    for number, (method, seeds) in enumerate({"new": (0, 1), "old": (0, 1), "count": (0,)}.items())
    for seed in seeds
    for exclude in (True, False)
}
FIGURES = [MethodFigures.of(FILES[key], key[0], key[1]) for key in FILES]


@pytest.mark.parametrize("exclude", [True, False])
def test_both_treatments_have_an_interval_for_every_comparison(exclude: bool) -> None:
    found = {
        (one.method, one.versus, one.metric): one
        for one in paired_intervals(FIGURES, {"new": ("old", "count", "absent"), "gone": ("old",)})
        if one.exclude_seen == exclude
    }
    assert set(found) == {
        ("new", versus, metric) for versus in ("old", "count") for metric in COMPARED_METRICS
    }
    for (method, versus, metric), interval in found.items():
        first, second = (
            np.mean(
                [
                    values.per_user()[metric]
                    for (name, _, treatment), values in FILES.items()
                    if name == one and treatment == exclude
                ],
                axis=0,
            )
            for one in (method, versus)
        )
        expected = paired_bootstrap(first, second)
        assert (interval.difference, interval.low, interval.high) == expected
