"""A tiny run with data, catalogue and CF models in place, for the tests that train."""

import pytest

from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.execute import execute


def tiny_config(runs_dir, **sections) -> Config:
    tree = {
        "name": "tiny",
        "runs_dir": str(runs_dir),
        "data": {"synthetic": {"users": 150, "items": 60, "categories": 5, "mean_length": 7.0}},
        "items": {"levels": 2, "codes_per_level": 8},
        "cf": {"epochs": 2, "hidden_size": 16, "num_layers": 1},
        "backbone": {
            "num_layers": 3,
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
            "checkpoint_steps": 3,
            "validation_users": 40,
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """runs_dir of a run whose stages prepare, index and cf are done."""
    runs_dir = tmp_path_factory.mktemp("tiny")
    for stage in ("prepare", "index", "cf"):
        execute(tiny_config(runs_dir), stage)
    return runs_dir
