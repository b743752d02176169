"""A tiny run for the tests that train: its configuration, and training it here."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import Mesh
from ilrec_dist.training.spec import TrainingSpec


def tiny_config(runs_dir, **sections) -> Config:
    tree = {
        "name": "tiny",
        "runs_dir": str(runs_dir),
        "data": {"synthetic": {"users": 150, "items": 60, "categories": 5, "mean_length": 7.0}},
        "items": {"levels": 2, "codes_per_level": 8},
        "cf": {"epochs": 2, "hidden_size": 16, "num_layers": 1},
        "backbone": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "dropout": 0.1,
            "init_std": 0.1,
        },
        "train": {
            "epochs": 2,
            "batch_size": 24,
            "warmup": 2,
            "max_history": 8,
            "checkpoint_steps": 6,
            "validation_users": 16,
        },
        "evaluation": {"beam": 10},
        "launch": {"engine": "torchrun", "threads": 1, "device": "cpu"},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    # Settings that have no effect with other data or other item forms are refused.
    if tree["data"].get("format", "synthetic") != "synthetic":
        del tree["data"]["synthetic"]
    if tree["items"].get("form", "semantic") != "semantic" or tree["items"].get("index"):
        del tree["items"]["levels"], tree["items"]["codes_per_level"]
    return config_from_dict(tree)


def train_here(
    mesh: Mesh,
    tree: dict,
    method: str,
    folder: str,
    stop_after: int | None = None,
    items_per_user: int | None = None,
    fingerprint: str = "test",
    waits: bool = True,
) -> None:
    """Train in this process, with a line of metrics
    every step; end early after a checkpoint.

    The training `waits` for each checkpoint to be committed.
    """
    from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
    from ilrec_dist.pipeline.artifacts import RunArtifacts
    from ilrec_dist.pipeline.train_one import train_one

    def stop(step: int) -> None:
        if stop_after is not None and step >= stop_after:
            raise InterruptedError

    torch.set_num_threads(1)
    config = config_from_dict(tree)
    spec = TrainingSpec(method, 0, Path(folder), fingerprint)
    artifacts = RunArtifacts(config)
    if items_per_user is not None:
        artifacts.__dict__["training"] = first_items(artifacts.dataset, items_per_user)
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        train_one(
            config, spec, artifacts, parallel, log_steps=1, on_checkpoint=stop if waits else None
        )
    except InterruptedError:
        pass
    finally:
        destroy_parallel()


def first_items(dataset: InteractionDataset, count: int) -> InteractionDataset:
    """The data set with the first `count` items of every user."""
    items = np.concatenate([dataset.sequence(user)[:count] for user in range(dataset.num_users)])
    offsets = np.arange(dataset.num_users + 1) * count
    return dataclasses.replace(dataset, items=items, offsets=offsets)


def losses_of(folder: Path) -> list[float]:
    return [line["loss/total"] for line in read_metrics(folder) if "loss/total" in line]
