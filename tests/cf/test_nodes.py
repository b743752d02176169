"""A node that dies with answers on it: they are asked for again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ilrec_dist.cf.rewards.service import RewardClient
from tests.support.nodes import BARE_HEAD

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
    pytest.mark.usefixtures("warm_ray"),
]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """Two nodes on this machine; the test may end the second."""
    size = {"num_cpus": 1, "object_store_memory": 100 << 20}
    # A dead node is found out in a second.
    soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 200,
        "health_check_failure_threshold": 5,
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**size, **BARE_HEAD, "_system_config": soon},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.add_node(**size)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def stand_in(name: str, node: str) -> Any:
    """A reward actor for the client on that node, without CF models that
    take seconds.
    """

    class Actor:
        def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
            # Over 100 kB: what is smaller travels with the reply.
            return np.repeat(users + positions, 1000).astype(np.float32)

        def counters(self) -> dict[str, float]:
            return {}

    kind: Any = ray.remote(Actor)
    return kind.options(
        name=name,
        num_cpus=0,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote()


def test_answers_that_went_with_their_node_are_asked_for_again(nodes: Cluster) -> None:
    (other,) = nodes.worker_nodes
    actors = [
        stand_in(f"far-{replica}-0", node.node_id)
        for replica, node in enumerate((nodes.head_node, other))
    ]
    client, release = RewardClient("far", replicas=2), threading.Event()
    # Busy with an earlier answer.
    client._thread.submit(release.wait)
    users, positions = np.arange(100), np.ones(100, np.int64)
    in_flight = [client.fetch_async(users, positions) for _ in range(4)]
    # All are computed, and lie on their nodes.
    ray.get([actor.counters.remote() for actor in actors])
    nodes.remove_node(other, allow_graceful=False)
    release.set()
    expected = np.repeat(users + positions, 1000).astype(np.float32)
    assert (
        all(np.array_equal(answer.result(), expected) for answer in in_flight)
        and client.meter.retries >= 2
    )
