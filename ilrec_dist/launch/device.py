"""What a process runs on: CPU or GPU, how many threads, and how much its libraries
print.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Literal

import torch

from ilrec_dist.launch.config import LaunchConfig


def resolve_device(launch: LaunchConfig) -> Literal["cpu", "cuda"]:
    """The device that `launch.device` names; for auto, the GPUs where every worker here
    has one.

    Workers to which Ray gave no GPU see none (ray_workers).
    """
    if launch.device != "auto":
        return launch.device
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "cuda" if torch.cuda.device_count() >= workers_here else "cpu"


def set_cpu_threads(launch: LaunchConfig, workers_here: int = 1) -> None:
    """Give this process `launch.threads` threads, or its share of the cores."""
    torch.set_num_threads(launch.threads or default_threads(workers_here))


def default_threads(workers_here: int) -> int:
    """The cores that this process may use, shared evenly by the workers of this
    machine.
    """
    return max(1, len(os.sched_getaffinity(0)) // workers_here)


def quiet() -> None:
    """Silence what DeepSpeed and Megatron print at start-up; keep what a user can act
    on.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    accelerator = "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    for name in ("deepspeed", "DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
