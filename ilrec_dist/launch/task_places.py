"""Places for the tasks of a stage on a cluster that other jobs use too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.errors import WorkersFailed
from ilrec_dist.common.places import Places
from ilrec_dist.launch.cluster_check import POLL_SECONDS, Demand, alive_nodes, amount
from ilrec_dist.launch.cluster_watch import PLACE_SECONDS, ClusterWatch, Waiters, watched_cluster


@contextmanager
def task_places(
    most: int | None, stage: str, seconds: float, on_gpus: bool = False
) -> Iterator[Places]:
    """Places for the tasks of a stage, for the length of the block: `most` or, with
    None, all that the cluster has; else what other jobs leave, and at least one.

    On GPUs where `on_gpus` and the cluster has some. What is waited for is said.
    Raises WorkersFailed where in `seconds` there is not one place.
    """
    nodes = alive_nodes()
    resource = "GPU" if on_gpus and any(amount(node, "GPU") for node in nodes) else "CPU"
    total = max(1, sum(amount(node, resource) for node in nodes))
    wanted = total if most is None else min(most, total)
    group = _free_places(resource, wanted)
    is_waiting = group is None
    group = group or placement_group([{resource: 1}])
    watch = ClusterWatch(
        Demand(resource, 1),
        seconds,
        lambda: None,
        # What is not free by now is waited for.
        Waiters(f"{stage}: the tasks", f"{stage}: ", need_all=False, quiet_seconds=0),
    )

    def check() -> None:
        if watch.failure is not None:
            raise WorkersFailed(watch.failure)

    try:
        with watched_cluster(watch):
            while is_waiting and not group.wait(POLL_SECONDS):
                check()
            count = len(group.bundle_specs)
            if count < wanted:
                line = f"{stage}: runs on {count} of the cluster's {total} {resource}s; other "
                line += "jobs have the others"
                print_plain(line)
            yield Places(resource, count, PlacementGroupSchedulingStrategy(group), check)
    finally:
        remove_placement_group(group)


def _free_places(resource: str, wanted: int) -> PlacementGroup | None:
    """All places that are wanted, or those that are free; None where none is.

    What this job itself has just given back is free a moment later.
    """
    group = _take(resource, wanted)
    if group is not None:
        return group
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return _take(resource, min(wanted, int(free.get(resource, 0))))


def _take(resource: str, count: int) -> PlacementGroup | None:
    """So many places, where they are free."""
    if count == 0:
        return None
    group: PlacementGroup = placement_group([{resource: 1}] * count)
    if group.wait(PLACE_SECONDS):
        return group
    remove_placement_group(group)
    return None
