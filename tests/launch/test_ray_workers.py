"""What Ray Train is asked for, and what becomes of its own failures."""

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.torch import TorchTrainer

from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.ray_workers import WITHOUT_USE, RayWorkers, run_ray


def test_helpers_without_use_are_those_that_ray_train_would_start():
    def names(trainer: type[TorchTrainer]) -> set[str]:
        return {type(one).__name__ for one in trainer(lambda: None)._create_default_callbacks()}

    assert names(TorchTrainer) - names(RayWorkers) == set(WITHOUT_USE)


@pytest.mark.parametrize(
    "error",
    [OutOfMemoryError("A node ran low on memory.\nRefer to the documentation."), ActorDiedError()],
)
def test_a_lost_controller_is_one_line(error, tmp_path, monkeypatch):
    def fail(trainer: RayWorkers) -> None:
        raise error

    monkeypatch.setattr(RayWorkers, "fit", fail)
    job = Job("tests.support.failing:refuse", {}, str(tmp_path))
    with pytest.raises(WorkersFailed, match="^Ray lost the process that leads") as failure:
        run_ray(LaunchConfig(device="cpu"), job)
    line = str(failure.value)
    assert line.endswith("The same command goes on where it stopped") and "\n" not in line
    assert str(error).splitlines()[0] in line
