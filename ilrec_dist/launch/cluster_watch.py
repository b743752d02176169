"""Watches the cluster while a worker group runs: whether it
has what the workers take, and whether they get it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import placement_group_table

from ilrec_dist.common.console import console, print_plain
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


@dataclass(frozen=True)
class Waiters:
    """Who waits for places, in words, and whether all places must be there."""

    who: str = "the workers"
    # Before what is said while they wait.
    prefix: str = ""
    need_all: bool = True
    # How long they wait before anything is said.
    quiet_seconds: float = PLACE_SECONDS
    # What to do, when others have the places, and when a node is gone.
    instead: str = "wait for the end of the jobs that have the others"
    goes_on: str = "give the same command again"


WORKERS = Waiters(
    instead="wait for the end of the jobs that have the others, or lower launch.workers",
    goes_on="the same command goes on from the last checkpoint",
)


class ClusterWatch(threading.Thread):
    """Says what the group waits for, and gives up in time.

    `give_up` is called once, when for `seconds` the cluster has had
    too little, or other jobs have had what the waiters need.
    """

    def __init__(
        self,
        demand: Demand,
        seconds: float,
        give_up: Callable[[], None],
        waiters: Waiters = WORKERS,
    ) -> None:
        super().__init__(name="nodes", daemon=True)
        self.demand, self.seconds, self.give_up = demand, seconds, give_up
        self.waiters = waiters
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
                f"{self.seconds:g}: {self.waiters.who} need {self.demand.words}, the cluster has "
                f"{cluster_words(nodes, self.demand.resource)}; add a node, and "
                f"{self.waiters.goes_on}"
            )
        return None

    def _watch_places(self) -> str | None:
        """Why the group is given up: for too long its workers have had no places."""
        is_waiting, now = waits_for_places(self.waiters.need_all), time.monotonic()
        if self._lost_since is not None or is_waiting is False:
            if self._is_crowding_said and is_waiting is False:
                console.print(f"{self.waiters.who} have their places", highlight=False)
            self._crowded_since, self._is_crowding_said = None, False
            return None
        if self._crowded_since is None:
            self._crowded_since = now if is_waiting else None
            return None
        if now - self._crowded_since > self.seconds:
            return (
                f"{self.waiters.who} got no places within launch.timeout_seconds = "
                f"{self.seconds:g}: they need {self.demand.words}, {self._free_words()}; "
                f"{self.waiters.instead}"
            )
        if now - self._crowded_since > self.waiters.quiet_seconds and not self._is_crowding_said:
            line = f"{self.waiters.prefix}waiting up to {self.seconds:.0f} s for "
            line += f"{self.demand.words}: {self._free_words()}"
            print_plain(line)
            self._is_crowding_said = True
        return None

    def _free_words(self) -> str:
        resource = self.demand.resource
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        there = cluster_words(alive_nodes(), resource)
        return f"the cluster has {there}, of which {int(free.get(resource, 0))} are free"


def waits_for_places(need_all: bool = True) -> bool | None:
    """Whether this job's workers wait for places, which
    other jobs have; None where none are asked for.

    need_all: whether one that has lost a part of its places waits.
    Between two of its requests Ray Train has none for a moment.
    """
    job = ray.get_runtime_context().get_job_id()
    # A group's id ends with that of its job.
    groups = [group for name, group in placement_group_table().items() if name.endswith(job)]
    waiting = [group for group in groups if group["state"] in WITHOUT_PLACES]
    if any(group["state"] == "CREATED" for group in groups):
        return False
    if not need_all and any(_has_some(group) for group in waiting):
        return False
    return True if waiting else None


def _has_some(group: dict[str, Any]) -> bool:
    """Whether some of a group's places are on nodes that are there."""
    there = {node["NodeID"] for node in alive_nodes()}
    return bool(there & set(group["bundles_to_node_id"].values()))


@contextmanager
def watched_cluster(watch: ClusterWatch) -> Iterator[None]:
    watch.start()
    try:
        yield
    finally:
        watch.stop()
