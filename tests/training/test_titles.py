"""Items as titles through training, under any layout of the step.

Rows, rewards and statistics end with each title.
"""

from __future__ import annotations

import numpy as np
import pytest

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.reporting.metrics_log import read_metrics
from ilrec_dist.testing.distributed import run_distributed
from tests.support.tiny_run import losses_of, tiny_config, train_here

pytestmark = pytest.mark.slow

WORDS = ("steel", "guitar", "strings", "light")


def test_titles_train_under_every_layout(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n"
        + "".join(f"u{row // 8},i{rng.integers(30)},{row}\n" for row in range(400))
    )
    (tmp_path / "items.csv").write_text(
        "item,title\n"
        + "".join(f"i{item},{' '.join(WORDS[: 1 + item % 4])} {item}\n" for item in range(30))
    )
    sections = {
        "data": {
            "format": "csv",
            "path": str(tmp_path / "rows.csv"),
            "items_path": str(tmp_path / "items.csv"),
        },
        "items": {"form": "titles", "title_vocab_size": 512},
        "train": {"targets": "last", "epochs": 1, "batch_size": 24, "validation_users": 20},
        "backbone": {"dropout": 0.0},
    }
    for stage in ("prepare", "index", "cf"):
        execute(tiny_config(tmp_path, **sections), stage)
    for name, world, tp, accumulation in (("alone", 1, 1, 1), ("many", 4, 2, 2)):
        layout = sections | {
            "launch": {"workers": world, "tp": tp},
            "train": sections["train"] | {"accumulation_steps": accumulation},
        }
        run_distributed(
            train_here,
            world,
            tp,
            config_to_dict(tiny_config(tmp_path, **layout)),
            "ilrec",
            str(tmp_path / name),
        )
    np.testing.assert_allclose(
        losses_of(tmp_path / "many"), losses_of(tmp_path / "alone"), rtol=0, atol=1e-4
    )

    catalogue, dataset = (
        Catalogue.load(tmp_path / "tiny/items"),
        load_dataset(tmp_path / "tiny/data"),
    )
    lengths = [
        catalogue.item_lengths(dataset.sequence(user)[1:-2]) for user in range(dataset.num_users)
    ]
    assert len(np.unique(np.concatenate(lengths))) > 1, "titles of several lengths"
    for name in ("alone", "many"):
        lines = [line for line in read_metrics(tmp_path / name) if "loss/total" in line]
        assert sum(line["rows"] for line in lines) == sum(each.sum() for each in lengths)
        assert lines[-1]["loss/cpo"] < lines[0]["loss/cpo"] - 0.5 and lines[-1]["loss/crr"] > 0
        assert all(line["rewards/coverage"] > 0.9 for line in lines)
        last = catalogue.depth - 1
        assert all(line[f"negatives/mean/pos{last}"] == 0 for line in lines), (
            "the longest title can only end"
        )
