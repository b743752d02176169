"""Tokens/s of a GPU and MFU, as if the workers were on GPUs: those of `ilrec plan`."""

from __future__ import annotations

import dataclasses

import pytest

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.model.utilisation import mfu, peak_of
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.plan.communication import MicroBatch, StepLayout
from ilrec_dist.plan.decoder import DecoderSizes
from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.speed import step_time
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.reporting.progress import TrainingState
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import tiny_config, train_here

H100 = Hardware(1, 2, 80e9, 50e9, 450e9, 600e12, 989e12, 3e12, 1e9)


def train_as_on_gpus(mesh: Mesh, tree: dict, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        name = "NVIDIA H100 80GB HBM3"
        patch.setattr("ilrec_dist.training.gpu_rates.gpu_name", lambda device: name)
        train_here(mesh, tree, "ilrec", folder)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_log_has_what_a_gpu_does_as_the_plan_reckons_it(tiny, tmp_path, precision):
    train = {"epochs": 1, "precision": precision}
    config = tiny_config(tiny, train=train, launch={"workers": 2, "tp": 2})
    run_distributed(train_as_on_gpus, 2, 2, config_to_dict(config), str(tmp_path))
    lines = [line for line in read_metrics(tmp_path) if "loss/total" in line]
    sizes = DecoderSizes.of(config.backbone, RunArtifacts(config).catalogue.vocab_size, 64)
    layout = StepLayout(2, 1, 1, 2, 1)
    for line in lines:
        per_gpu = line["rate/tokens_per_second_per_gpu"]
        assert per_gpu == pytest.approx(line["rate/tokens_per_second"] / 2)
        # The peaks are those of bf16.
        assert ("rate/mfu" in line) == (precision == "bf16")
        tokens, rows = int(line["tokens"]), int(line["rows"])
        sequences = config.train.batch_size
        batch = MicroBatch(sequences, tokens / sequences, rows, 0, packed_tokens=tokens)
        # Final layer and one of three as the source of negatives.
        planned = step_time(sizes, batch, layout, H100, [], 0, 2)
        as_long = dataclasses.replace(planned, products=line["time/all"], update=0.0)
        assert line.get("rate/mfu", as_long.mfu) == pytest.approx(as_long.mfu)
    state = TrainingState(len(lines))
    for line in lines:
        state.see(line)
    assert any(part.startswith("MFU ") for part in state.parts()) == (precision == "bf16")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        # A part of a GPU, and one that the table has not.
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H20", None),
    ],
)
def test_a_peak_is_that_of_the_whole_gpu_of_this_name(name, peak):
    assert peak_of(name) == peak


def test_mfu_is_what_all_gpus_did_of_what_they_can_do():
    # Four GPUs of 10 FLOP/s could have done 80 in two seconds.
    assert mfu(20.0, 2.0, 10.0, 4) == 0.25
