"""What DeepSpeed is told, by precision, ZeRO stage, layout and device, and what it
prints.
"""

from __future__ import annotations

import contextlib
import io
import itertools

import pytest
import torch

from ilrec_dist.distributed.deepspeed_mpu import import_deepspeed
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.plan.communication import StepLayout
from ilrec_dist.plan.decoder import PlannedGroup
from ilrec_dist.plan.memory import BUCKET_GRADIENTS, CUT_BUCKET_GRADIENTS, bucket_bytes
from ilrec_dist.plan.plan import ELEMENT_BYTES
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import build_engine, deepspeed_config

OVERLAPPING = {
    (precision, stage, 2, True)
    for precision, stage in (("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 2), ("bf16", 3))
}
CASES = list(itertools.product(("fp32", "bf16"), (1, 2, 3), (1, 2), (False, True)))
GROUPS = [PlannedGroup((1000,), 2)]


@pytest.mark.parametrize(("precision", "stage", "dp", "is_cuda"), CASES)
def test_gradients_are_summed_beside_the_backward_pass_where_that_works(
    precision, stage, dp, is_cuda
):
    config = TrainConfig(precision=precision, zero_stage=stage)
    zero = deepspeed_config(config, dp, is_cuda)["zero_optimization"]
    overlaps = (precision, stage, dp, is_cuda) in OVERLAPPING
    read = import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**zero)
    assert read.overlap_comm is overlaps

    def layout(is_cuda: bool) -> StepLayout:
        return StepLayout(1, dp, 1, ELEMENT_BYTES[precision], stage, is_cuda)

    # The plan counts the second bucket, which ZeRO 3 does not have.
    more = bucket_bytes(GROUPS, layout(is_cuda)) - bucket_bytes(GROUPS, layout(False))
    has_second = overlaps and stage < 3
    assert more == (ELEMENT_BYTES[precision] * BUCKET_GRADIENTS if has_second else 0)


@pytest.mark.parametrize("size", [1000, 3 * CUT_BUCKET_GRADIENTS])
def test_the_plan_knows_the_bucket_of_zero_3(size):
    config = TrainConfig(precision="bf16", zero_stage=3)
    bucket = deepspeed_config(config, 2, True, 5000)["zero_optimization"]["reduce_bucket_size"]
    planned = bucket_bytes([PlannedGroup((size,), 2, True)], StepLayout(1, 2, 1, 2, 3))
    assert planned == 4 * (bucket + size)


def printed_by_an_engine(mesh: Mesh, config: TrainConfig) -> str:
    parallel = initialize_parallel(mesh.tp)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            build_engine(torch.nn.Linear(1, 1), config, parallel)
    finally:
        destroy_parallel()
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_is_printed_when_an_engine_is_built(stage: int) -> None:
    config = TrainConfig(precision="bf16", zero_stage=stage)
    assert run_distributed(printed_by_an_engine, stage, 1, config) == [""] * stage
