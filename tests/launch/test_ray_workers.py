"""What Ray Train is asked for."""

from ray.train.torch import TorchTrainer

from ilrec_dist.launch.ray_workers import WITHOUT_USE, RayWorkers


def test_helpers_without_use_are_those_that_ray_train_would_start():
    def names(trainer: type[TorchTrainer]) -> set[str]:
        return {type(one).__name__ for one in trainer(lambda: None)._create_default_callbacks()}

    assert names(TorchTrainer) - names(RayWorkers) == set(WITHOUT_USE)
