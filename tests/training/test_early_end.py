"""A training that is asked to end does so where it logs, and after the step at hand
where steps are slow; one that ends at a validation has its step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ilrec_dist.pipeline.train_one as module
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import Stopped
from ilrec_dist.common.stop_request import ASKED
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.prompting import epoch_steps
from ilrec_dist.pipeline.train_one import train_one
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import Mesh, run_distributed
from ilrec_dist.testing.whole_weights import whole_weights
from ilrec_dist.training import checkpoint, trainer
from ilrec_dist.training.early_end import SLOW_SECONDS
from ilrec_dist.training.spec import TrainingSpec
from tests.support.tiny_run import losses_of, tiny_config, train_here

pytestmark = pytest.mark.slow
ASKED_IN_STEP = 3


def train_and_ask(mesh: Mesh, tree: dict[str, Any], folder: str, seconds: float) -> bool:
    """Train with steps that take so long, and ask in one; whether it was heard."""
    config, rate = config_from_dict(tree), trainer.learning_rate

    def slow_rate(settings: Any, step: int, total_steps: int) -> float:
        if step == ASKED_IN_STEP:
            (Path(folder).parent / ASKED).touch()
        time.sleep(seconds)
        return rate(settings, step, total_steps)

    parallel = initialize_parallel(mesh.tp)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "learning_rate", slow_rate)
        try:
            spec = TrainingSpec("sft", 0, Path(folder), "f")
            train_one(config, spec, RunArtifacts(config), parallel)
        except Stopped:
            return True
        finally:
            destroy_parallel()
    return False


@pytest.mark.parametrize(
    ("seconds", "ends_after"), [(SLOW_SECONDS, ASKED_IN_STEP + 1), (0.0, trainer.LOG_STEPS)]
)
def test_a_training_ends_early(tiny: Path, tmp_path: Path, seconds: float, ends_after: int) -> None:
    # An epoch, behind which it logs too, is longer than ten steps.
    tree = config_to_dict(tiny_config(tiny, train={"batch_size": 6}, launch={"workers": 2}))
    folder = tmp_path / "sft-seed0"
    assert run_distributed(train_and_ask, 2, 1, tree, str(folder), seconds) == [True, True]
    (newest,) = checkpoint.committed(folder / "checkpoints")[-1:]
    assert newest.name == f"step-{ends_after:08d}"
    # What was learned since the last line is told.
    assert [line["step"] for line in read_metrics(folder)] == [ends_after]


def train_and_end_at_a_validation(mesh: Mesh, tree: dict[str, Any], folder: str, where: str) -> int:
    """Fail in the first validation or behind it. Returns the newest checkpoint."""
    validate, rate = module.evaluate_model, trainer.learning_rate
    validations = []

    def evaluate(*arguments: Any, **options: Any) -> Any:
        validations.append(where)
        if where == "in it":
            raise InterruptedError
        return validate(*arguments, **options)

    def rate_or_failure(*arguments: Any) -> float:
        if validations:
            raise InterruptedError
        return rate(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "evaluate_model", evaluate)
        patched.setattr(trainer, "learning_rate", rate_or_failure)
        train_here(mesh, tree, "sft", folder, waits=False)
    until = time.monotonic() + 30
    while not checkpoint.committed(Path(folder) / "checkpoints") and time.monotonic() < until:
        time.sleep(0.01)
    return int(checkpoint.committed(Path(folder) / "checkpoints")[-1].name[5:])


@pytest.mark.parametrize("where", ["in it", "behind it"])
def test_an_end_at_a_validation_costs_no_step(tiny: Path, tmp_path: Path, where: str) -> None:
    config = tiny_config(tiny, train={"checkpoint_steps": 1000})
    tree, cut, whole = config_to_dict(config), tmp_path / "cut", tmp_path / "whole"
    steps = epoch_steps(config, RunArtifacts(config))
    assert run_distributed(train_and_end_at_a_validation, 1, 1, tree, str(cut), where) == [steps]
    for folder in (cut, whole):
        run_distributed(train_here, 1, 1, tree, "sft", str(folder))
    validations = [
        {key: value for key, value in line.items() if key != "time"}
        for folder in (cut, whole)
        for line in read_metrics(folder)
        if "validation/ndcg@10" in line
    ]
    assert [line["step"] for line in validations] == 2 * [steps, 2 * steps]
    assert validations[:2] == validations[2:] and losses_of(cut) == losses_of(whole)
    kept, expected = (whole_weights(folder / "best") for folder in (cut, whole))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
