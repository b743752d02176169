"""The configuration section `launch`: where and how the workers run."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    NonNegative,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)


@section()
class LaunchConfig:
    """Where and how the workers run."""

    engine: Annotated[Literal["ray", "torchrun"], Affects()] = "ray"
    # Processes over all machines, one per GPU: tp × dp.
    workers: Annotated[Positive, Affects()] = 1
    # Processes that share one copy of the model.
    tp: Annotated[Positive, Affects()] = 1
    # Whether training cuts norms, the residual stream and dropout over these processes too, along
    # the tokens.
    sequence_parallel: Annotated[
        Bool, Affects(), OnlyIf("launch.tp above 1", lambda config: config.launch.tp > 1)
    ] = False
    # Whether a tensor-parallel group may lie on several nodes, whose links are slow for it.
    tp_across_nodes: Annotated[
        Bool,
        Affects(),
        OnlyIf("launch.tp above 1", lambda config: config.launch.tp > 1),
        OnlyIf("launch.engine ray", lambda config: config.launch.engine == "ray"),
    ] = False
    # The device of the workers; auto: the GPUs, where every worker can have one.
    device: Annotated[Literal["auto", "cpu", "cuda"], Affects()] = "auto"
    # CPU threads per worker, beside its GPU too; None: its share of the node's cores.
    threads: Annotated[Optional[Positive], Affects()] = None
    # Restarts of the worker group before the run gives up.
    max_failures: Annotated[NonNegative, Affects()] = 3
    # After so many seconds a collective, a worker or reward actors that do not answer, a lost node
    # that nothing replaces and places that other jobs hold are given up.
    timeout_seconds: Annotated[PositiveFloat, Affects()] = 600.0
    # The Ray cluster to use; None: RAY_ADDRESS, or a local Ray that is started for the run.
    ray_address: Annotated[
        Optional[str],
        Affects(),
        OnlyIf("launch.engine ray", lambda config: config.launch.engine == "ray"),
    ] = None

    @property
    def dp(self) -> int:
        return self.workers // self.tp

    @property
    def lock_seconds(self) -> float:
        """How long rank 0 waits for a folder that a killed command's last processes
        hold: the other ranks wait in a collective, which must not end before.
        """
        return self.timeout_seconds / 2
