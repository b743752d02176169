"""The reward service: Ray actors that answer `TokenRewards.fetch`, and the client that survives their deaths (METHOD.md §5)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from ilrec_dist.cf.client import Meter, Pending
from ilrec_dist.cf.rewards import TokenRewards
from ilrec_dist.data.prepared import load_prepared
from ilrec_dist.errors import UserError
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie


class RewardActor:
    """One process that holds the CF models. It keeps no state but its counters, so a restarted one gives the same bits."""

    def __init__(self, cf_folder: str, prepared_folder: str, catalogue_folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        catalogue = Catalogue.load(catalogue_folder)
        self._rewards = TokenRewards.open(cf_folder, load_prepared(prepared_folder), catalogue, Trie(catalogue))

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As `TokenRewards.fetch`."""
        return self._rewards.fetch(users, positions)

    def counters(self) -> dict[str, float]:
        """`TokenRewards.counters` since this process began."""
        return dict(self._rewards.counters)


@contextmanager
def reward_actors(
    cf_folder: str | Path,
    prepared_folder: str | Path,
    catalogue_folder: str | Path,
    *,
    name: str,
    replicas: int = 1,
    threads: int = 1,
    max_restarts: int = 3,
) -> Iterator[list[Any]]:
    """Actors named `name`-0, `name`-1, … for the length of the block; Ray restarts each up to `max_restarts` times.

    They ask for no CPUs of Ray's, which the training workers hold, and end with the block or with the job that started them.
    Raises UserError when one cannot load (a folder that is damaged or belongs to other data) and ValueError when the name is taken.
    """
    paths = [str(Path(folder).resolve()) for folder in (cf_folder, prepared_folder, catalogue_folder)]
    kind: Any = ray.remote(RewardActor)
    actors = [kind.options(name=f"{name}-{replica}", num_cpus=0, max_restarts=max_restarts).remote(*paths, threads) for replica in range(replicas)]
    try:
        try:
            ray.get([actor.counters.remote() for actor in actors])
        except RayActorError as error:
            raise UserError(f"the reward actors {name!r} did not start: {_reason(error)}") from None
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ilrec_dist.errors.UserError: ") if lines else type(error).__name__


class RewardClient:
    """Sends each request to the next replica, and again, to the one after it, when an actor dies or stays silent for `timeout` seconds.

    Any process of the Ray job can make one. The rewards depend neither on which replica answers nor on retries.
    Raises UserError when no actors of that name run in this job.
    """

    def __init__(self, name: str, replicas: int = 1, *, retries: int = 16, timeout: float = 600.0, backoff: float = 0.25) -> None:
        try:
            self.actors = [ray.get_actor(f"{name}-{replica}") for replica in range(replicas)]
        except ValueError:
            raise UserError(f"no reward actors named {name!r} run in this Ray job; start them with cf.service.reward_actors") from None
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self.meter = Meter()
        self._turn = 0

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> Pending:
        """Begin `TokenRewards.fetch(users, positions)` on an actor; `.result()` gives float32 [nnz], UserError after the last retry."""
        return _ActorPending(self, np.asarray(users, np.int64), np.asarray(positions, np.int64))

    def counters(self) -> dict[str, float]:
        """The actors' counters, summed; what a dead process had counted is gone with it."""
        totals: dict[str, float] = {}
        for actor in self.actors:
            part: Any = ray.get(actor.counters.remote())
            totals = {key: totals.get(key, 0) + value for key, value in part.items()}
        return totals

    def send(self, users: np.ndarray, positions: np.ndarray) -> Any:
        """Ray's reference to the next replica's answer."""
        actor = self.actors[self._turn % len(self.actors)]
        self._turn += 1
        return actor.fetch.remote(users, positions)


class _ActorPending(Pending):
    def __init__(self, client: RewardClient, users: np.ndarray, positions: np.ndarray) -> None:
        super().__init__(client.meter)
        self._client, self._targets = client, (users, positions)
        self._reference = client.send(users, positions)

    def ready(self) -> bool:
        return bool(ray.wait([self._reference], timeout=0)[0])

    def _take(self) -> np.ndarray:
        client = self._client
        for attempt in range(client.retries + 1):
            try:
                return np.array(ray.get(self._reference, timeout=client.timeout))  # a copy: Ray's own array is read-only
            except (RayActorError, GetTimeoutError) as error:
                failure = type(error).__name__
            if attempt < client.retries:
                client.meter.retries += 1
                if attempt > 0:  # the first goes at once: to another replica, or to the process that Ray has started in the dead one's place
                    time.sleep(min(client.backoff * 2 ** (attempt - 1), 10.0))
                self._reference = client.send(*self._targets)
        raise UserError(f"the reward actors gave no answer after {client.retries} retries ({failure}); see Ray's logs, or set cf.rewards=in_process")
