"""Watches the cluster while a worker group runs: whether it
has what the workers take, and whether they get it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.util import placement_group_table

from ilrec_dist.common.console import console
from ilrec_dist.launch.cluster_check import (
    POLL_SECONDS,
    Demand,
    alive_nodes,
    cluster_words,
    is_missing,
    say_waiting,
)

# Places that are free are given within these; only then is anything said.
PLACE_SECONDS = 5.0
# What Ray calls a group of places that it cannot give yet.
WITHOUT_PLACES = ("PENDING", "PREPARED", "RESCHEDULING")


class ClusterWatch(threading.Thread):
    """Says what the group waits for, and gives up in time.

    `give_up` is called once, when for `seconds` the cluster has had
    too little, or other jobs have had what the workers need.
    """

    def __init__(self, demand: Demand, seconds: float, give_up: Callable[[], None]) -> None:
        super().__init__(name="nodes", daemon=True)
        self.demand, self.seconds, self.give_up = demand, seconds, give_up
        self.failure: str | None = None
        self._stop_asked = threading.Event()
        self._lost_since: float | None = None
        self._crowded_since: float | None = None
        self._is_crowding_said = False

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        while not self._stop_asked.wait(POLL_SECONDS):
            self.failure = self._watch_nodes() or self._watch_places()
            if self.failure is not None:
                self.give_up()
                return

    def _watch_nodes(self) -> str | None:
        """Why the group is given up: for too long the cluster has had too little."""
        nodes, now = alive_nodes(), time.monotonic()
        if not is_missing(self.demand, nodes):
            if self._lost_since is not None:
                console.print(f"the cluster has {self.demand.words} again", highlight=False)
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = now
            console.print("a node of the cluster is lost", highlight=False)
            say_waiting(self.demand, nodes, self.seconds)
        elif now - self._lost_since > self.seconds:
            return (
                f"a node was lost and none took its place within launch.timeout_seconds = "
                f"{self.seconds:g}: the workers need {self.demand.words}, the cluster has "
                f"{cluster_words(nodes, self.demand.resource)}; add a node, and the same "
                "command goes on from the last checkpoint"
            )
        return None

    def _watch_places(self) -> str | None:
        """Why the group is given up: for too long its workers have had no places."""
        is_waiting, now = waits_for_places(), time.monotonic()
        if self._lost_since is not None or is_waiting is False:
            if self._is_crowding_said and is_waiting is False:
                console.print("the workers have their places", highlight=False)
            self._crowded_since, self._is_crowding_said = None, False
            return None
        if self._crowded_since is None:
            self._crowded_since = now if is_waiting else None
            return None
        if now - self._crowded_since > self.seconds:
            return (
                f"the workers got no places within launch.timeout_seconds = {self.seconds:g}: "
                f"they need {self.demand.words}, {self._free_words()}; wait for the end of the "
                "jobs that have the others, or lower launch.workers"
            )
        if now - self._crowded_since > PLACE_SECONDS and not self._is_crowding_said:
            line = f"waiting up to {self.seconds:.0f} s for {self.demand.words}: "
            line += self._free_words()
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._is_crowding_said = True
        return None

    def _free_words(self) -> str:
        resource = self.demand.resource
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        there = cluster_words(alive_nodes(), resource)
        return f"the cluster has {there}, of which {int(free.get(resource, 0))} are free"


def waits_for_places() -> bool | None:
    """Whether this job's workers wait for places, which
    other jobs have; None where none are asked for.

    Between two of its requests Ray Train has none for a moment.
    """
    job = ray.get_runtime_context().get_job_id()
    # A group's id ends with that of its job.
    states = [
        group["state"] for name, group in placement_group_table().items() if name.endswith(job)
    ]
    if "CREATED" in states:
        return False
    return True if set(states) & set(WITHOUT_PLACES) else None


@contextmanager
def watched_cluster(
    demand: Demand, seconds: float, give_up: Callable[[], None]
) -> Iterator[ClusterWatch]:
    watch = ClusterWatch(demand, seconds, give_up)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
