"""A loss that is not finite on one rank:
every rank leaves the step out, and goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.train_one import train_one
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.training.spec import TrainingSpec
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow

BAD = (3, 4)


def train_with_bad_steps(mesh: Mesh, tree: dict, folder: str, value: float) -> dict[str, Any]:
    """The sum of the weights before each step, with
    the loss of rank 1 replaced in the steps of BAD.
    """
    config = config_from_dict(tree)
    parallel = initialize_parallel(mesh.tp)
    torch.set_num_threads(1)
    forward = CrossLayerObjective.forward
    sums: list[float] = []

    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = self.backbone.parameters()
        # Each step has one micro-batch, so this is the sum before step len(sums).
        sums.append(float(sum(p.detach().double().sum() for p in weights)))
        output = forward(self, *args, **kwargs)
        if len(sums) in BAD and mesh.rank == 1:
            # A finite gradient, as that of an infinite logarithm.
            object.__setattr__(output, "loss", output.loss + value)
        return output

    error = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossLayerObjective, "forward", replaced)
        try:
            spec = TrainingSpec("sft", 0, Path(folder), "f")
            train_one(config, spec, RunArtifacts(config), parallel, log_steps=1)
        except UserError as refused:
            error = str(refused)
        finally:
            destroy_parallel()
    return {"sums": sums, "error": error}


@pytest.mark.parametrize(
    ("value", "tp", "train"),
    [
        (float("nan"), 1, {}),
        (float("inf"), 1, {"precision": "bf16"}),
        (float("nan"), 1, {"precision": "bf16", "zero_stage": 2}),
        (float("inf"), 1, {"precision": "bf16", "zero_stage": 3}),
        (float("inf"), 2, {}),
    ],
)
def test_all_ranks_leave_out_a_step_that_is_bad_on_one(tiny, tmp_path, value, tp, train):
    launch = {"workers": 2, "tp": tp}
    tree = config_to_dict(tiny_config(tiny, train={"epochs": 1} | train, launch=launch))
    found = run_distributed(train_with_bad_steps, 2, tp, tree, str(tmp_path), value)
    for rank in found:
        assert rank["error"] == "" and len(rank["sums"]) >= 6
        changed = [a != b for a, b in zip(rank["sums"], rank["sums"][1:], strict=False)]
        assert [n for n, change in enumerate(changed, start=1) if not change] == list(BAD)
    # Under tensor parallelism each rank has other weights.
    assert (found[0]["sums"] == found[1]["sums"]) == (tp == 1)
    logged = [line["step"] for line in read_metrics(tmp_path) if "loss/total" in line]
    assert set(logged) & set(BAD) == set() and {2, 5} <= set(logged)


def test_too_many_in_a_row_end_the_run_with_step_term_and_rate(tiny, tmp_path):
    tree = config_to_dict(
        tiny_config(tiny, train={"epochs": 1, "max_bad_steps": 1}, launch={"workers": 2})
    )
    found = run_distributed(train_with_bad_steps, 2, 1, tree, str(tmp_path), float("nan"))
    (error,) = {rank["error"] for rank in found}
    for part in ("sft, seed 0: step 4", "(learning rate 0.00", "as in each of the 1 steps before"):
        assert part in error
