"""ZeRO 3: with the weights cut over the data-parallel ranks, a training is the same."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.model.hf.families import DECODER
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.testing.measured_step import SmallTraining, StepSpec, write_model
from ilrec_dist.testing.whole_weights import whole_weights
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import set_learning_rate
from tests.support.tiny_run import losses_of, tiny_config, train_here

pytestmark = pytest.mark.slow


def train_and_look(mesh: Mesh, *arguments: Any) -> None:
    """Train in this process, which must then hold nothing of DeepSpeed's optimizer."""
    train_here(mesh, *arguments)
    gc.collect()
    names = "DeepSpeedZeroOptimizer_Stage3", "PartitionedParameterCoordinator"
    kept = [one for one in gc.get_objects() if type(one).__name__ in names and vars(one)]
    assert not kept, kept


def trained(
    tiny: Path, folder: Path, world: int, tp: int, stop: int | None = None, **train
) -> Path:
    """Train into the folder, without dropout, which each dp draws otherwise. Beside tp
    tokens are cut as well.
    """
    sections = {
        "launch": {"workers": world, "tp": tp, "sequence_parallel": tp > 1},
        "train": {"epochs": 1, "validation_users": 10, "checkpoint_steps": 4} | train,
        "backbone": {"dropout": 0.0},
    }
    config = config_to_dict(tiny_config(tiny, **sections))
    run_distributed(train_and_look, world, tp, config, "ilrec", str(folder), stop)
    return folder


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
    """Trained by one process."""
    return trained(tiny, tmp_path_factory.mktemp("alone"), 1, 1)


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (4, 2)])
def test_zero_3_gives_the_losses_and_weights_of_one_process(tiny, tmp_path, alone, world, tp):
    cut = trained(tiny, tmp_path, world, tp, zero_stage=3, accumulation_steps=2)
    np.testing.assert_allclose(losses_of(cut), losses_of(alone), rtol=0, atol=1e-5)
    for name in ("best", "final"):
        expected, found = whole_weights(alone / name), whole_weights(cut / name)
        for key, tensor in expected.items():
            # Key biases have no true gradient: Adam walks them by rounding alone.
            if not key.endswith("linear_qkv.bias"):
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)


def test_a_training_goes_on_under_another_stage_with_the_same_losses(tiny, tmp_path, alone):
    # Three ranks need padding.
    for world, tp, stage, stop in ((3, 1, 3, 2), (2, 1, 1, 4), (4, 2, 3, 6), (2, 1, 2, None)):
        trained(tiny, tmp_path, world, tp, stop, zero_stage=stage)
    expected, found = losses_of(alone), losses_of(tmp_path)
    assert len(expected) == len(found) == 7
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_an_interrupted_training_under_zero_3_ends_with_the_same_bits(tiny, tmp_path):
    keys = {"zero_stage": 3, "precision": "bf16", "recompute": True, "micro_batch_tokens": 60}
    whole = trained(tiny, tmp_path / "whole", 2, 1, **keys)
    cut = trained(tiny, tmp_path / "cut", 2, 1, 4, **keys)
    trained(tiny, cut, 2, 1, **keys)
    expected, found = whole_weights(whole / "final"), whole_weights(cut / "final")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = trained(tiny, tmp_path / "other", 2, 1, **keys | {"zero_stage": 1})
    np.testing.assert_allclose(losses_of(cut), losses_of(other), rtol=0, atol=4e-2)


def steps_of(mesh: Mesh, spec: StepSpec) -> tuple[list[float], float]:
    """The losses of three steps, and the last norm of the gradient."""
    training = SmallTraining(mesh, spec)
    set_learning_rate(training.engine, 5e-3)
    losses = []
    for _ in range(3):
        _, output = training.forward()
        losses.append(float(output.loss))
        training.engine.backward(output.loss)
        training.engine.step()
    norm = float(training.engine.get_global_grad_norm())
    training.close()
    return losses, norm


def test_zero_3_trains_adapters_and_rows_beside_frozen_weights(tmp_path):
    decoder = BackboneConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=80,
        **DECODER,
        tie_embeddings=False,
    )
    train = TrainConfig(
        batch_size=8,
        lora=LoraConfig(rank=4),
        trainable="lora+new_rows",
        new_rows_learning_rate=1e-2,
        recompute=True,
    )
    spec = StepSpec(decoder, ObjectiveConfig(), train, 257, items=5, depth=3, new_rows=64)
    folder = str(tmp_path / "model")
    run_distributed(write_model, 2, 1, spec, folder)
    found = []
    for stage in (1, 3):
        keys = dataclasses.replace(train, zero_stage=stage)
        step = dataclasses.replace(spec, model=folder, train=keys)
        found.append(run_distributed(steps_of, 4, 2, step))
    for (losses, norm), (expected, expected_norm) in zip(*found, strict=True):
        np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


def gradients_of_an_ended_training(mesh: Mesh, spec: StepSpec) -> tuple[bool, bool]:
    """Whether a rank's gradients are in memory before and
    after its training ends, while somebody knows its weights.
    """
    training = SmallTraining(mesh, spec)
    training.step()
    weights = list(training.engine.module.parameters())
    gradients = weakref.ref(training.engine.optimizer.grad_partitions_flat_buffer)
    before = gradients() is not None
    training.close()
    del training
    gc.collect()
    assert weights
    return before, gradients() is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_an_ended_training_are_freed_whoever_knows_its_weights(precision):
    train = TrainConfig(batch_size=8, zero_stage=3, precision=precision)
    decoder = BackboneConfig(num_layers=2, hidden_size=32, num_heads=4)
    spec = StepSpec(decoder, ObjectiveConfig(), train, 257, items=5, depth=3)
    for found in run_distributed(gradients_of_an_ended_training, 2, 1, spec):
        assert found == (True, False)
