"""The configuration section `launch`: where and how the workers run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from ilrec_dist.common.config_fields import Affects, NonNegative, OnlyIf, Positive, section


def _sets_threads(config: Any) -> bool:
    launch = config.launch
    return bool(launch.device != "cuda" or launch.engine == "torchrun")


@section()
class LaunchConfig:
    """Where and how the workers run."""

    engine: Annotated[Literal["ray", "torchrun"], Affects()] = "ray"
    # Processes over all machines, one per GPU: tp × dp.
    workers: Annotated[Positive, Affects("train")] = 1
    # Processes that share one copy of the model.
    tp: Annotated[Positive, Affects("train")] = 1
    # The device of the workers; auto: the GPUs, where every worker can have one.
    device: Annotated[Literal["auto", "cpu", "cuda"], Affects()] = "auto"
    # CPU threads per worker; None: the cores shared evenly. Under torchrun also those that a
    # worker has beside its GPU.
    threads: Annotated[
        Optional[Positive],
        Affects(),
        OnlyIf("launch.device cpu or auto, or launch.engine torchrun", _sets_threads),
    ] = None
    # Restarts of the worker group before the run gives up.
    max_failures: Annotated[NonNegative, Affects()] = 3
    # The Ray cluster to use; None: RAY_ADDRESS, or a local Ray that is started for the run.
    ray_address: Annotated[
        Optional[str],
        Affects(),
        OnlyIf("launch.engine ray", lambda config: config.launch.engine == "ray"),
    ] = None

    @property
    def dp(self) -> int:
        return self.workers // self.tp
