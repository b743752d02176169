"""What DeepSpeed is told, by precision, ZeRO stage, layout and device."""

from __future__ import annotations

import itertools

import pytest

from ilrec_dist.distributed.deepspeed_mpu import import_deepspeed
from ilrec_dist.plan.communication import StepLayout
from ilrec_dist.plan.memory import BUCKET_GRADIENTS, bucket_bytes
from ilrec_dist.plan.plan import ELEMENT_BYTES
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import deepspeed_config

OVERLAPPING = {("fp32", 1, 2, True), ("fp32", 2, 2, True), ("bf16", 2, 2, True)}
CASES = list(itertools.product(("fp32", "bf16"), (1, 2), (1, 2), (False, True)))


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

    # The plan counts the second bucket.
    more = bucket_bytes(1000, layout(is_cuda)) - bucket_bytes(1000, layout(False))
    assert more == (ELEMENT_BYTES[precision] * BUCKET_GRADIENTS if overlaps else 0)
