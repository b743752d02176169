"""The reward service: Ray actors that answer `TokenRewards.fetch`, and the client that survives their deaths (METHOD.md §5)."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.futures import Meter, RewardFuture
from ilrec_dist.cf.rewards.token_rewards import Part, TokenRewards, merge
from ilrec_dist.cf.sasrec.checkpoint import read_code_order
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.reversed import both_directions
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie


class RewardActor:
    """One process that holds the CF models. It keeps no state but its counters and what it can compute anew, so a restarted one gives the same bits."""

    def __init__(self, load: Callable[[], TokenRewards], threads: int) -> None:
        _yield_to_training()
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        self._rewards = load()
        self._rewards.learn_ahead(threads)

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As `TokenRewards.fetch`."""
        return self._rewards.fetch(users, positions)

    def part(self, users: np.ndarray, positions: np.ndarray) -> Part:
        """As `TokenRewards.part`: what this shard knows."""
        return self._rewards.part(users, positions)

    def counters(self) -> dict[str, float]:
        """`TokenRewards.counters` since this process began."""
        return dict(self._rewards.counters)


def _yield_to_training() -> None:
    """Give way to training workers on the same cores; it gets all it needs once they wait for rewards."""
    os.setpriority(
        os.PRIO_PROCESS, 0, 19
    )  # of this thread and those it will start: Ray's own go on as they were (its workers have 15)


def load_rewards(
    cf_folder: Path,
    prepared_folder: Path,
    catalogue_folder: Path,
    shard: int | None,
    backwards: bool,
) -> TokenRewards:
    """What an actor does first; again in the process that takes a dead one's place."""
    catalogue, dataset = Catalogue.load(catalogue_folder), load_dataset(prepared_folder)
    trie = Trie.load(catalogue_folder, catalogue)
    return TokenRewards.open(
        cf_folder, both_directions(dataset) if backwards else dataset, catalogue, trie, shard
    )


@contextmanager
def reward_actors(
    cf_folder: str | Path,
    prepared_folder: str | Path,
    catalogue_folder: str | Path,
    *,
    name: str,
    replicas: int = 1,
    shards: int = 1,
    threads: int = 1,
    max_restarts: int = 3,
    backwards: bool = False,
) -> Iterator[list[Any]]:
    """`replicas` × `shards` actors, named `name`-REPLICA-SHARD, for the length of the block; Ray restarts each up to `max_restarts` times.

    With shards (as many as cf.reward_shards) each holds one range of the catalogue's codes. They are spread over the cluster's nodes, ask for no CPUs of
    Ray's, which the training workers hold, and end with the block or with the job that started them. `backwards` as `data.both_directions`.
    Raises UserError when one cannot load (a folder that is damaged or belongs to other data, or to another number of shards) and ValueError when the name is
    taken.
    """
    cf, dataset, catalogue = (
        Path(folder).resolve() for folder in (cf_folder, prepared_folder, catalogue_folder)
    )
    if shards > 1 and (written := read_code_order(cf)["shards"]) != shards:
        raise UserError(
            f"{cf}: written for {written} shards, not {shards}; set cf.reward_shards and cf.reward_index, and run `ilrec cf` again"
        )
    kind: Any = ray.remote(RewardActor)
    actors = []
    for replica in range(replicas):
        for shard in range(shards):
            load = partial(
                load_rewards, cf, dataset, catalogue, shard if shards > 1 else None, backwards
            )
            options = {
                "name": f"{name}-{replica}-{shard}",
                "num_cpus": 0,
                "max_restarts": max_restarts,
                "scheduling_strategy": "SPREAD",
            }
            actors.append(kind.options(**options).remote(load, threads))
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
    return (
        lines[-1].removeprefix("ilrec_dist.common.errors.UserError: ")
        if lines
        else type(error).__name__
    )


class RewardClient:
    """Sends each request to the next replica, and again, to the one after it, when an actor or its node dies or stays silent for `timeout` seconds.

    Any process of the Ray job can make one. The rewards depend neither on which replica answers nor on retries. With shards, every shard of a
    replica is asked and the parts are merged. Raises UserError when no such actors run in this job.
    """

    def __init__(
        self,
        name: str,
        replicas: int = 1,
        shards: int = 1,
        *,
        retries: int = 16,
        timeout: float = 600.0,
        backoff: float = 0.25,
    ) -> None:
        try:
            self.actors = [
                [ray.get_actor(f"{name}-{replica}-{shard}") for shard in range(shards)]
                for replica in range(replicas)
            ]
        except ValueError:
            raise UserError(
                f"no reward actors named {name!r} run in this Ray job; start them with cf.service.reward_actors"
            ) from None
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self.meter = Meter()
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-client")
        self._failure: UserError | None = None

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """Begin `TokenRewards.fetch(users, positions)` on the actors; `.result()` gives float32 [nnz], UserError after the last retry.

        A thread brings the answer into this process as soon as it is there, so that the step that takes it does not talk to Ray.
        """
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        return RewardFuture(
            self.meter,
            self._thread,
            partial(self._answer, self._send(users, positions), users, positions),
        )

    def counters(self) -> dict[str, float]:
        """The actors' counters, summed; what a dead process had counted is gone with it. Asked again like rewards; UserError after the last retry."""
        totals: dict[str, float] = {}
        for actor in [actor for shards in self.actors for actor in shards]:
            ask = partial(_ask, actor)
            (part,) = self._get(ask(), ask)
            totals = {key: totals.get(key, 0) + value for key, value in part.items()}
        return totals

    def _send(self, users: np.ndarray, positions: np.ndarray) -> list[Any]:
        """Ray's references to the answers of the next replica's shards."""
        shards = self.actors[self._turn % len(self.actors)]
        self._turn += 1
        return (
            [shards[0].fetch.remote(users, positions)]
            if len(shards) == 1
            else [actor.part.remote(users, positions) for actor in shards]
        )

    def _answer(
        self, references: list[Any], users: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        if self._failure is not None:
            raise self._failure  # those behind a request that was given up do not wait as long once more
        try:
            answers = self._get(references, partial(self._send, users, positions))
        except UserError as error:
            self._failure = error
            raise
        return (
            merge(answers) if isinstance(answers[0], Part) else np.array(answers[0])
        )  # a copy: Ray's own array is read-only

    def _get(self, references: list[Any], again: Callable[[], list[Any]]) -> list[Any]:
        """The answers; `again` sends the request once more."""
        for attempt in range(self.retries + 1):
            try:
                answers: list[Any] = ray.get(references, timeout=self.timeout)
                return answers
            except (
                RayActorError,
                ObjectLostError,
                GetTimeoutError,
            ) as error:  # lost: it was computed, and its node died before it was taken
                failure = type(error).__name__
            if attempt < self.retries:
                self.meter.retries += 1
                if (
                    attempt > 0
                ):  # the first goes at once: to another replica, or to the process that Ray has started in the dead one's place
                    time.sleep(min(self.backoff * 2 ** (attempt - 1), 10.0))
                references = again()
        raise UserError(
            f"the reward actors gave no answer after {self.retries} retries ({failure}); see Ray's logs, or set cf.rewards=in_process"
        )


def _ask(actor: Any) -> list[Any]:
    return [actor.counters.remote()]


@contextmanager
def reward_actor(cf: CFConfig, folders: RunFolders, both_directions: bool) -> Iterator[None]:
    """The run's reward actors for the length of the block.

    Their counters are left in the run's CF folder when it ends. `both_directions` is that of the
    configuration's `data` section.
    """
    with reward_actors(
        folders.cf,
        folders.data,
        folders.items,
        name=reward_actor_name(folders),
        replicas=cf.reward_replicas,
        shards=cf.reward_shards,
        max_restarts=-1,
        backwards=both_directions,
    ):
        yield
        counters = RewardClient(
            reward_actor_name(folders), cf.reward_replicas, cf.reward_shards
        ).counters()
        write_json(folders.cf / "actor-counters.json", counters)


def reward_client(cf: CFConfig, folders: RunFolders) -> RewardClient:
    """A client of the run's reward actors, for a worker."""
    return RewardClient(
        reward_actor_name(folders),
        cf.reward_replicas,
        cf.reward_shards,
        retries=cf.reward_retries,
    )


def reward_actor_name(folders: RunFolders) -> str:
    """One name per run folder, so that runs may share a cluster."""
    root = folders.root.resolve()
    return f"rewards-{root.name}-{zlib.crc32(str(root).encode()):08x}"
