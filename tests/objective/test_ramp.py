"""β, μ and λ rise over the first steps: from
supervised fine-tuning to the whole loss.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.config.load import ConfigError, config_from_dict
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.items.trie import Trie
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.windows import training_windows
from tests.support.toy_decoder import MAX_HISTORY, toy_backbone, toy_catalogue, toy_data

FULL = ObjectiveConfig(cpo_beta=0.8, cpd_mu=0.4, crr_lambda=0.3)


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


def test_the_loss_goes_from_that_of_no_terms_to_that_of_all(parallel):
    catalogue, data = toy_catalogue(), toy_data()
    backbone = toy_backbone(catalogue)
    windows = training_windows(data, MAX_HISTORY, "all")
    numbers = np.arange(9)
    batch = BatchMaker(data, catalogue, Trie(catalogue), windows).make(numbers, 1)
    rewards = torch.rand(len(batch.candidate_tokens), generator=torch.Generator().manual_seed(1))

    def loss(config: ObjectiveConfig, step: int = 0) -> float:
        objective = CrossLayerObjective.build(backbone, config, catalogue, parallel).eval()
        objective.begin_step(step, 100)
        inputs = batch.model_inputs(parallel.device)
        output = objective(*inputs, rewards=rewards, loss_scale=1 / len(batch.rows))
        statistics = objective.make_statistics(catalogue.depth)
        statistics.add(output.rows, batch.num_tokens)
        assert statistics.report(None)["loss/total"] == pytest.approx(output.loss.item(), rel=1e-5)
        return output.loss.item()

    ramped = dataclasses.replace(FULL, ramp=0.5)
    nothing = dataclasses.replace(FULL, cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0)
    half = dataclasses.replace(FULL, cpo_beta=0.4, cpd_mu=0.2, crr_lambda=0.15)
    assert loss(ramped, 0) == loss(nothing)
    assert loss(ramped, 25) == loss(half)
    assert loss(ramped, 50) == loss(ramped, 99) == loss(FULL) == loss(FULL, 99)


def test_a_ramp_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="objective.ramp.*has no effect"):
        config_from_dict({"objective": {"ramp": 0.2, "cpo_beta": 0, "cpd_mu": 0, "crr_lambda": 0}})
