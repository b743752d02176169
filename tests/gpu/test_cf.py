"""SASRec trained on a CUDA device: as good as on the CPU. Skipped where there is no
device.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.checkpoint import read_model
from ilrec_dist.cf.sasrec.fit import TrainingSequences, fit_sasrec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_model_trained_on_the_device_is_about_the_one_trained_on_the_cpu(tmp_path: Path) -> None:
    items = ((np.arange(4000) * 7) % 50).astype(np.int32)
    starts, lengths = np.arange(0, 4000, 10), np.full(400, 8)
    histories = TrainingSequences(items, starts, lengths, np.full(400, 8))
    config = CFConfig(epochs=3, dropout=0.0)
    reports = [
        fit_sasrec(
            config, ItemShard(50), histories, tmp_path / f"{device}.safetensors", 0, device=device
        )
        for device in ("cpu", "cuda")
    ]
    losses = [[line["loss"] for line in report["curve"]] for report in reports]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    here, there = (
        read_model(tmp_path / f"{device}.safetensors", config, ItemShard(50))
        for device in ("cpu", "cuda")
    )
    assert torch.allclose(here.items.weight, there.items.weight, atol=1e-2)
