"""Every loss term that has a weight is logged, and the total is their weighted sum."""

import dataclasses

import pytest
import torch
from ilrec_kernels import RowStats

from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.metrics import LossStatistics


def test_terms_are_logged_by_position_and_add_up_to_the_total():
    rng = torch.Generator().manual_seed(3)
    weights = ObjectiveConfig(cpd_mu=0.3, crr_lambda=0.7).term_weights
    rows = RowStats.zeros(12, 1, torch.float32, torch.device("cpu"))
    drawn = {term: torch.rand(12, generator=rng) for term in ("cpo", "cpd", "crr")}
    rows = dataclasses.replace(rows, **drawn)
    statistics = LossStatistics(3, [1], weights, torch.device("cpu"))
    statistics.add(rows, num_tokens=20)
    report = statistics.report(None)
    assert (report["rows"], report["tokens"]) == (12, 20)
    for term, values in rows.terms.items():
        assert report[f"loss/{term}"] == pytest.approx(values.mean().item())
        for position in range(3):
            expected = values[position::3].mean().item()
            assert report[f"loss/{term}/pos{position}"] == pytest.approx(expected)
    total = (rows.cpo + 0.3 * rows.cpd + 0.7 * rows.crr).mean().item()
    assert report["loss/total"] == pytest.approx(total)
    statistics.add(dataclasses.replace(rows, cpd=rows.cpd * torch.nan), num_tokens=1)
    assert not statistics.is_finite(None)
