"""The configuration section `launch`: where and how the workers run."""

from __future__ import annotations

from typing import Literal, Optional

from ilrec_dist.common.config_fields import NonNegative, Positive, section


@section
class LaunchConfig:
    """Where and how the workers run."""

    engine: Literal["ray", "torchrun"] = "ray"
    workers: Positive = 1  # processes over all machines, one per GPU: tp × dp
    tp: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Optional[Positive] = None  # CPU threads per worker; None: the cores shared evenly
    max_failures: NonNegative = 3  # worker-group restarts before the run gives up
    ray_address: Optional[str] = None  # None: a local Ray is started for the run

    @property
    def dp(self) -> int:
        return self.workers // self.tp
