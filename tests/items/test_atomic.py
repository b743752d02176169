"""Atomic ids through training, rewards kept on disk, and decoding."""

from __future__ import annotations

import pytest
import torch

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.cf_world import documented_metrics
from tests.support.tiny_run import tiny_config, train_here

pytestmark = pytest.mark.slow


def test_atomic_ids_train_and_decode_and_stored_rewards_have_the_same_bits(tmp_path):
    config = tiny_config(tmp_path, items={"form": "atomic"}, cf={"reward_cache": True})
    for stage in ("prepare", "index", "cf"):
        execute(config, stage)
    assert Catalogue.load(tmp_path / "tiny/items").depth == 1
    logs = []
    for name in ("first", "again"):
        run_distributed(train_here, 1, 1, config_to_dict(config), "ilrec", str(tmp_path / name))
        logs.append(read_metrics(tmp_path / name))
    assert max(line.get("validation/ndcg@10", 0.0) for line in logs[0]) > 0.02, (
        "decoding finds targets: 60 items, and 10 of them are looked at"
    )
    last, last_again = ([line for line in log if "rewards/answers" in line][-1] for log in logs)
    assert documented_metrics() <= last.keys()
    assert last["loss/crr"] > 0 and last["rewards/coverage"] > 0.9
    assert last["rewards/answers"] == 14 and last["rewards/cached"] >= 2, (
        "the second epoch reads what the first computed, but for what is asked ahead"
    )
    assert last_again["rewards/cached"] == last_again["rewards/answers"] == last["rewards/answers"]
    first, again = (whole_weights(tmp_path / name / "final") for name in ("first", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)
