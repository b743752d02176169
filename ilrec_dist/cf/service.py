"""The reward service: Ray actors that answer `TokenRewards.fetch`, and the client that survives their deaths (METHOD.md §5)."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from ilrec_dist.cf.rewards import TokenRewards
from ilrec_dist.data.prepared import load_prepared
from ilrec_dist.errors import UserError
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie

LATENCIES_KEPT = 10_000


class RewardActor:
    """One process that holds the CF models. It keeps no state but its counters, so a restarted one gives the same bits."""

    def __init__(self, cf_folder: str, prepared_folder: str, catalogue_folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        catalogue = Catalogue.load(catalogue_folder)
        self._rewards = TokenRewards.open(cf_folder, load_prepared(prepared_folder), catalogue, Trie(catalogue))
        self._counters = {"calls": 0, "targets": 0, "rows": 0, "seconds": 0.0}

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As `TokenRewards.fetch`."""
        started = time.perf_counter()
        rewards = self._rewards.fetch(users, positions)
        self._counters["calls"] += 1
        self._counters["targets"] += len(users)
        self._counters["rows"] += len(users) * self._rewards.trie.depth
        self._counters["seconds"] += time.perf_counter() - started
        return rewards

    def counters(self) -> dict[str, float]:
        """calls, targets, rows (targets × code levels) and seconds spent, since this process began."""
        return dict(self._counters)


def start_reward_actors(
    cf_folder: str | Path,
    prepared_folder: str | Path,
    catalogue_folder: str | Path,
    *,
    name: str,
    replicas: int = 1,
    threads: int = 1,
    max_restarts: int = 3,
) -> list[ActorHandle[Any]]:
    """Start the run's actors, named `name`-0, `name`-1, …; Ray restarts each up to `max_restarts` times. They end with the job that started them.

    They ask for no CPUs of Ray's: the training workers hold those. Returns when all have loaded; raises UserError when one cannot
    (a folder that is damaged or belongs to other data) and ValueError when the name is taken.
    """
    paths = [str(Path(folder).resolve()) for folder in (cf_folder, prepared_folder, catalogue_folder)]
    kind = ray.remote(RewardActor).options(num_cpus=0, max_restarts=max_restarts, max_task_retries=0)
    actors = [kind.options(name=f"{name}-{replica}").remote(*paths, threads) for replica in range(replicas)]
    try:
        ray.get([actor.counters.remote() for actor in actors])
    except RayActorError as error:
        for actor in actors:
            ray.kill(actor)
        raise UserError(f"the reward actors {name!r} did not start: {_last_line(error)}") from None
    return actors


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ilrec_dist.errors.UserError: ") if lines else type(error).__name__


class _Answer:
    """A request sent to an actor; asks again when the actor dies."""

    def __init__(self, client: RewardClient, users: np.ndarray, positions: np.ndarray) -> None:
        self._client, self._arguments = client, (users, positions)
        self._sent = time.perf_counter()
        self._actor = client.next_actor()
        self._reference = self._actor.fetch.remote(*self._arguments)

    def ready(self) -> bool:
        return bool(ray.wait([self._reference], timeout=0)[0])

    def result(self) -> np.ndarray:
        client = self._client
        for attempt in range(client.retries + 1):
            try:
                rewards = ray.get(self._reference, timeout=client.timeout)
            except (RayActorError, GetTimeoutError) as error:
                if attempt == client.retries:
                    raise UserError(
                        f"the reward actors gave no answer after {client.retries} retries ({type(error).__name__}); see Ray's logs, or set cf.rewards=in_process"
                    ) from None
                client.counters["retries"] += 1
                time.sleep(min(client.backoff * 2**attempt, 10.0))  # Ray is restarting it
                self._actor = client.next_actor()
                self._reference = self._actor.fetch.remote(*self._arguments)
            else:
                client.counters["targets"] += len(self._arguments[0])
                client.latencies.append(time.perf_counter() - self._sent)
                return np.array(rewards)  # Ray's own array is read-only
        raise AssertionError("unreachable")


class RewardClient:
    """Sends each request to the next replica; retries it, on the next one, when an actor dies or stays silent for `timeout` seconds.

    Any process of the Ray job can make one from the actors' handles. The rewards do not depend on which replica answers, nor on retries.
    """

    def __init__(self, actors: list[ActorHandle[Any]], *, retries: int = 8, timeout: float = 600.0, backoff: float = 0.25) -> None:
        self.actors, self.retries, self.timeout, self.backoff = actors, retries, timeout, backoff
        self.counters = {"targets": 0, "retries": 0}
        self.latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)  # seconds from sending to having the answer
        self._turn = 0

    @staticmethod
    def connect(name: str, replicas: int = 1, **options: Any) -> RewardClient:
        """A client of the actors that `start_reward_actors(name=…)` started in this Ray namespace. Raises UserError when they are not there."""
        try:
            return RewardClient([ray.get_actor(f"{name}-{replica}") for replica in range(replicas)], **options)
        except ValueError:
            raise UserError(f"no reward actors named {name!r} in this Ray session; start them with start_reward_actors") from None

    def next_actor(self) -> ActorHandle[Any]:
        self._turn += 1
        return self.actors[self._turn % len(self.actors)]

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> _Answer:
        """Begin `TokenRewards.fetch(users, positions)` on an actor; `.result()` gives float32 [nnz], UserError after the last retry."""
        return _Answer(self, np.asarray(users, np.int64), np.asarray(positions, np.int64))

    def actor_counters(self) -> dict[str, float]:
        """The actors' counters, summed; what a dead process had counted is gone with it."""
        totals: dict[str, float] = {}
        for counters in ray.get([actor.counters.remote() for actor in self.actors]):
            for key, value in counters.items():
                totals[key] = totals.get(key, 0) + value
        return totals

    def metrics(self) -> dict[str, float]:
        """Targets answered, retries, and the latency's 50th, 95th and 99th percentiles in seconds."""
        latency = np.array(self.latencies or [0.0])
        return {**self.counters, **{f"latency_p{q}": float(np.percentile(latency, q)) for q in (50, 95, 99)}}
