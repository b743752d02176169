"""SASRec trained on a CUDA device: as good as on the CPU, and handed back on the CPU. Skipped where there is no device."""

import numpy as np
import pytest
import torch

from ilrec_dist.cf.fit import Histories, train_model
from ilrec_dist.config import CFConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_model_trained_on_the_device_is_about_the_one_trained_on_the_cpu():
    items = ((np.arange(4000) * 7) % 50).astype(np.int32)
    starts, lengths = np.arange(0, 4000, 10), np.full(400, 8)
    histories = Histories(items, starts, lengths, np.full(400, 8))
    config = CFConfig(epochs=3, dropout=0.0)
    (here, report), (there, other) = (train_model(config, 50, histories, "full", 0, device=device) for device in ("cpu", "cuda"))
    assert there.device.type == "cpu"
    assert [line["loss"] for line in other["curve"]] == pytest.approx([line["loss"] for line in report["curve"]], rel=1e-3)
    assert torch.allclose(here.items.weight, there.items.weight, atol=1e-2)
