"""How many worker groups fit side by side:
on the named Ray cluster, or on this machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from ilrec_dist.launch.cluster import cluster_address, ray_session
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.device import default_threads


@dataclass(frozen=True)
class Room:
    """What worker groups share, and how much of it there is."""

    unit: Literal["CPU", "GPU"]
    total: int
    # This machine's GPUs, as CUDA_VISIBLE_DEVICES names them, which groups must divide among
    # them; empty on CPUs, and on a Ray cluster, which gives each worker its own.
    devices: tuple[str, ...] = ()

    def needed_by(self, launch: LaunchConfig) -> int:
        """What a worker group takes: a GPU, or its threads' cores, for each worker."""
        if self.unit == "GPU" or _on_cluster(launch):
            return launch.workers
        return launch.workers * (launch.threads or default_threads(launch.workers))


def find_room(launch: LaunchConfig) -> Room:
    """The room of the cluster that is named, or of this machine.

    Raises UserError where no cluster answers.
    """
    if _on_cluster(launch):
        with ray_session(launch) as resources:
            gpus = int(resources.get("GPU", 0))
            on_gpus = launch.device == "cuda" or (launch.device == "auto" and gpus > 0)
            return Room("GPU", gpus) if on_gpus else Room("CPU", int(resources.get("CPU", 0)))
    gpus = 0 if launch.device == "cpu" else torch.cuda.device_count()
    if gpus >= launch.workers:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        return Room("GPU", gpus, tuple(visible.split(",")[:gpus]))
    return Room("CPU", len(os.sched_getaffinity(0)))


def _on_cluster(launch: LaunchConfig) -> bool:
    return launch.engine == "ray" and cluster_address(launch) is not None
