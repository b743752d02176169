"""The plan's memory and communication are those of a real step of small models."""

from __future__ import annotations

import dataclasses

import pytest

from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.hf.families import DECODER
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.testing.measured_step import StepSpec, measure_step, write_model
from ilrec_dist.testing.reckoned_step import reckoned_step
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
STATE = ("weights", "gathered", "gradients", "master_weights", "moments")
CROSS_ENTROPY = ObjectiveConfig(cpo_beta=0.0, cpd_mu=0.0, crr_lambda=0.0)


def train(accumulation: int = 1, precision: str = "fp32", **keys) -> TrainConfig:
    return TrainConfig(
        batch_size=8 * accumulation,
        accumulation_steps=accumulation,
        precision=precision,
        lora=LoraConfig(rank=4),
        **keys,
    )


SPECS = {
    "gpt": StepSpec(GPT, CROSS_ENTROPY, train(), 257, items=5, depth=3),
    "llama": StepSpec(LLAMA, ILREC, train(), 1_031, items=8, depth=4),
    "llama, accumulated": StepSpec(LLAMA, ILREC, train(2), 1_031, items=8, depth=4),
    "llama, bf16": StepSpec(LLAMA, ILREC, train(2, "bf16"), 1_031, items=8, depth=4),
    "qwen": StepSpec(QWEN, ILREC, train(), 257, items=5, depth=3),
    "llama, recomputed": StepSpec(LLAMA, ILREC, train(recompute=True), 1_031, items=8, depth=4),
}
# Of a model with 64 more tokens: tp, and what is trained.
PARTIAL = {
    "adapters": (2, train(trainable="lora")),
    "adapters and rows": (
        2,
        train(1, "bf16", trainable="lora+new_rows", recompute=True),
    ),
    "rows": (1, train(trainable="new_rows")),
    "adapters and rows, packed": (1, train(trainable="lora+new_rows")),
    "adapters, cut tokens, packed": (2, train(trainable="lora")),
    "adapters and rows, ZeRO 3": (
        1,
        train(trainable="lora+new_rows", zero_stage=3, recompute=True),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> StepSpec:
    """LoRA's model, written as a Hugging Face folder."""
    spec = StepSpec(LLAMA, ILREC, train(), 1_031, items=8, depth=4, new_rows=64)
    folder = str(tmp_path_factory.mktemp("plan") / "llama")
    run_distributed(write_model, 2, 1, spec, folder)
    return dataclasses.replace(spec, model=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tp", [1, 2])
def test_memory_and_collectives_of_a_step_are_those_of_the_plan(name: str, tp: int) -> None:
    check(SPECS[name], tp)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "qwen", "llama, recomputed"])
def test_a_step_whose_tokens_are_cut_is_that_of_the_plan(name: str) -> None:
    check(dataclasses.replace(SPECS[name], sequence_parallel=True), 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_under_zero_2_and_3_is_that_of_the_plan(precision: str, stage: int) -> None:
    keys = train(2, precision, zero_stage=stage)
    check(dataclasses.replace(SPECS["llama"], train=keys), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTIAL)
def test_a_step_with_frozen_weights_is_that_of_the_plan(name: str, model: StepSpec) -> None:
    tp, keys = PARTIAL[name]
    is_cut, packs = "cut tokens" in name, name.endswith("packed")
    check(dataclasses.replace(model, train=keys, packs=packs, sequence_parallel=is_cut), tp)


def check(spec: StepSpec, tp: int) -> None:
    """Compare the plan with a step of two processes."""
    found = run_distributed(measure_step, 2, tp, spec)
    most = {
        part: max(getattr(measured, part) for measured in found) for part in (*STATE, "activations")
    }
    planned = reckoned_step(spec, tp, 2 // tp, found[0].rows, found[0].entries)
    for part in STATE:
        assert getattr(planned, part) == most[part], part
    # Packed batches have some padding, and recomputation shares some tensors.
    error = 0.1 if spec.packs or spec.train.recompute else 0.01
    assert planned.activations == pytest.approx(most["activations"], rel=error)
    # Of added tokens only the last rank of a tensor-parallel group has rows.
    for measured in found[tp - 1 :: tp] if spec.new_rows else found:
        assert measured.collectives == planned.collectives
    assert sum(measured.checkpoint for measured in found) == planned.checkpoint
