"""The plan's memory and communication are those of a real step of small models."""

from __future__ import annotations

import dataclasses

import pytest

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.hf.families import DECODER
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.testing.measured_step import StepSpec, measure_step, reckoned_step
from ilrec_dist.training.config import TrainConfig

GPT = BackboneConfig(num_layers=3, hidden_size=64, num_heads=4)
LLAMA = BackboneConfig(
    num_layers=4,
    hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=240,
    **DECODER,
    tie_embeddings=False,
)
QWEN = dataclasses.replace(LLAMA, num_layers=2, num_kv_heads=1, qk_norm=True, tie_embeddings=True)
ILREC = ObjectiveConfig()
CROSS_ENTROPY = ObjectiveConfig(cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0)


def train(accumulation: int = 1, precision: str = "fp32") -> TrainConfig:
    return TrainConfig(
        batch_size=8 * accumulation, accumulation_steps=accumulation, precision=precision
    )


SPECS = {
    "gpt": StepSpec(GPT, CROSS_ENTROPY, train(), 257, items=5, depth=3),
    "llama": StepSpec(LLAMA, ILREC, train(), 1_031, items=8, depth=4),
    "llama, accumulated": StepSpec(LLAMA, ILREC, train(2), 1_031, items=8, depth=4),
    "llama, bf16": StepSpec(LLAMA, ILREC, train(2, "bf16"), 1_031, items=8, depth=4),
    "qwen": StepSpec(QWEN, ILREC, train(), 257, items=5, depth=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tp", [1, 2])
def test_memory_and_collectives_of_a_step_are_those_of_the_plan(name: str, tp: int) -> None:
    spec = SPECS[name]
    found = run_distributed(measure_step, 2, tp, spec)
    most = {
        part: max(getattr(measured, part) for measured in found)
        for part in ("weights", "gradients", "master_weights", "moments", "activations")
    }
    planned = reckoned_step(spec, tp, 2 // tp, found[0].rows, found[0].entries)
    for part, measured in most.items():
        assert getattr(planned, part) == pytest.approx(measured, rel=0.1), part
    for measured_step in found:
        assert measured_step.collectives == planned.collectives
