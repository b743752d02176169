"""The weights that a training begins with, as a worker builds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from ilrec_dist.config.load import config_from_dict
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import initial_backbone
from ilrec_dist.testing.distributed import Mesh
from tests.support.whole_model import full_state_dict

TITLES = ["red lamp", "blue lamp", "", "green chair", "small green chair", "oak table"]


def shop() -> InteractionDataset:
    items = np.arange(6, dtype=np.int32)
    ids = [f"item {number}" for number in range(6)]
    return InteractionDataset(items, np.array([0, 6]), ["u"], ids, titles=TITLES)


@dataclasses.dataclass(frozen=True)
class ShopArtifacts(RunArtifacts):
    """The artifacts of a run whose data are the shop's."""

    dataset = shop()


def start_weights(mesh: Mesh, tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    config = config_from_dict(tree)
    initialize_parallel(mesh.tp, "cpu")
    try:
        return full_state_dict(initial_backbone(config, ShopArtifacts(config), 3))
    finally:
        destroy_parallel()
