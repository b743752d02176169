"""The reward service: Ray actors that answer `TokenRewards.fetch`, and their client.

The client survives the actors' deaths (METHOD.md §5).
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.futures import LatencyMeter, RewardFuture
from ilrec_dist.cf.rewards.token_rewards import ShardRewards, TokenRewards, merge_shards
from ilrec_dist.cf.sasrec.checkpoint import read_code_order
from ilrec_dist.common.console import print_plain
from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.reversed import both_directions as read_both_directions
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie

# Actors that load faster are not spoken of.
QUIET_SECONDS = 5.0
POLL_SECONDS = 1.0
RAISE_OR_DO_WITHOUT = "raise launch.timeout_seconds, or set cf.rewards=in_process"


class RewardActor:
    """One process that holds the CF models.

    It keeps no state but its counters and what it can compute anew, so a restarted one
    gives the same bits.
    """

    def __init__(self, load: Callable[[], TokenRewards], threads: int) -> None:
        _yield_to_training()
        # Ray lets a process that asks for no GPU see all of its node, which are the workers'.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        self._rewards = load()
        self._rewards.precompute_in_background(threads)

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """As `TokenRewards.fetch`."""
        return self._rewards.fetch(users, positions)

    def shard_rewards(self, users: np.ndarray, positions: np.ndarray) -> ShardRewards:
        """As `TokenRewards.shard_rewards`."""
        return self._rewards.shard_rewards(users, positions)

    def counters(self) -> dict[str, float]:
        """`TokenRewards.counters` since this process began."""
        return dict(self._rewards.counters)


def _yield_to_training() -> None:
    """Give way to training workers on the same cores.

    The actor gets all it needs once they wait for rewards. The priority is that of this
    thread and those it will start; Ray's own threads keep theirs (its workers have 15).
    """
    os.setpriority(os.PRIO_PROCESS, 0, 19)


def load_rewards(
    cf_folder: Path,
    data_folder: Path,
    items_folder: Path,
    shard: int | None,
    both_directions: bool,
) -> TokenRewards:
    """What an actor does first; again in the process that takes a dead one's place."""
    catalogue, dataset = Catalogue.load(items_folder), load_dataset(data_folder)
    trie = Trie.load(items_folder, catalogue)
    if both_directions:
        dataset = read_both_directions(dataset)
    return TokenRewards.open(cf_folder, dataset, catalogue, trie, shard)


@contextmanager
def reward_actors(
    cf_folder: str | Path,
    data_folder: str | Path,
    items_folder: str | Path,
    *,
    name: str,
    replicas: int = 1,
    shards: int = 1,
    threads: int = 1,
    max_restarts: int = 3,
    both_directions: bool = False,
    nodes: Sequence[str] = (),
    timeout: float = 600.0,
) -> Iterator[list[Any]]:
    """Run `replicas` × `shards` actors, named `name`-REPLICA-SHARD, for the block.

    Ray restarts each up to `max_restarts` times. With shards (as many as
    cf.reward_shards) each holds one range of the catalogue's codes. They are spread
    over the nodes with the ids `nodes`, or all of the cluster's; one whose node is lost
    goes to any. They ask for no CPUs of Ray's, which the training workers hold,
    and end with the block or with the job that started them. `both_directions` as
    in the configuration's `data` section.

    Raises UserError when one cannot load (a folder that is damaged or belongs to other
    data, or to another number of shards), WorkersFailed when one has not loaded after
    `timeout` seconds, and ValueError when the name is taken.
    """
    cf, data, items = (Path(folder).resolve() for folder in (cf_folder, data_folder, items_folder))
    if shards > 1 and (written := read_code_order(cf)["shards"]) != shards:
        raise UserError(
            f"{cf}: written for {written} shards, not {shards}; set cf.reward_shards and "
            "cf.reward_index, and run `ilrec cf` again"
        )
    kind: Any = ray.remote(RewardActor)
    actors = []
    places = _places(nodes)
    for replica in range(replicas):
        for shard in range(shards):
            load = partial(
                load_rewards, cf, data, items, shard if shards > 1 else None, both_directions
            )
            options = {
                "name": f"{name}-{replica}-{shard}",
                "num_cpus": 0,
                "max_restarts": max_restarts,
                "scheduling_strategy": next(places),
            }
            actors.append(kind.options(**options).remote(load, threads))
    try:
        try:
            _wait_until_loaded(actors, cf, timeout)
        except RayActorError as error:
            raise UserError(f"the reward actors {name!r} did not start: {_reason(error)}") from None
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _wait_until_loaded(actors: Sequence[Any], cf: Path, seconds: float) -> None:
    """Say after a while what is waited for; raise what the first one to fail raises."""
    waiting, began, is_said = [actor.counters.remote() for actor in actors], time.monotonic(), False
    while waiting:
        loaded, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
        ray.get(loaded)
        spent = time.monotonic() - began
        state = f"{len(actors) - len(waiting)} of {len(actors)} reward actors have loaded {cf}"
        if waiting and spent > seconds:
            raise WorkersFailed(
                f"{state} within launch.timeout_seconds = {seconds:g}; look whether their nodes "
                f"have memory left and read that folder, {RAISE_OR_DO_WITHOUT}"
            )
        if waiting and spent > QUIET_SECONDS and not is_said:
            line = f"waiting up to {seconds:.0f} s for the reward actors: {state}"
            print_plain(line)
            is_said = True


def _places(nodes: Sequence[str]) -> Iterator[Any]:
    """Ray's strategies for one actor after the other."""
    on_nodes = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    return itertools.cycle(on_nodes or ["SPREAD"])


def _reason(error: Exception) -> str:
    """The last line of an actor's error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1].removeprefix("ilrec_dist.common.errors.UserError: ")


class RewardClient:
    """Sends each request to the next replica of the reward actors.

    It sends the request again, to the replica after it, when an actor or its node dies
    or stays silent for its share of `timeout` seconds, after which it gives up. Any
    process of the Ray job can make a client. The rewards depend neither on which
    replica answers nor on retries. With shards, every shard of a replica is asked and
    the answers are merged.
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
        """timeout and backoff are seconds. Raises UserError where no such
        actors run.
        """
        try:
            self.actors = [
                [ray.get_actor(f"{name}-{replica}-{shard}") for shard in range(shards)]
                for replica in range(replicas)
            ]
        except ValueError:
            raise UserError(
                f"no reward actors named {name!r} run in this Ray job; run `ilrec train`, which "
                "starts them, or set cf.rewards=in_process"
            ) from None
        self.retries, self.timeout, self.backoff = retries, timeout, backoff
        self.meter = LatencyMeter()
        self._next_replica = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-client")
        self._failure: UserError | None = None

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """Begin `TokenRewards.fetch(users, positions)` on the actors.

        `.result()` gives float32 [nnz], or raises UserError after the last retry. A
        thread brings the answer into this process as soon as it is there, so that the
        step that takes it does not talk to Ray.
        """
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        references = self._send(users, positions)
        receive = partial(self._receive, references, users, positions)
        return RewardFuture(self.meter, self._thread, receive)

    def counters(self) -> dict[str, float]:
        """The actors' counters, summed; what a dead process had counted is gone.

        Asked for again like rewards; raises UserError after the last retry.
        """
        totals: dict[str, float] = {}
        for actor in [actor for shards in self.actors for actor in shards]:
            send = partial(_request_counters, actor)
            (counters,) = self._get(send(), send)
            totals = {key: totals.get(key, 0) + value for key, value in counters.items()}
        return totals

    def _send(self, users: np.ndarray, positions: np.ndarray) -> list[Any]:
        """Ray's references to the answers of the next replica's shards."""
        shards = self.actors[self._next_replica % len(self.actors)]
        self._next_replica += 1
        if len(shards) == 1:
            return [shards[0].fetch.remote(users, positions)]
        return [actor.shard_rewards.remote(users, positions) for actor in shards]

    def _receive(
        self, references: list[Any], users: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        if self._failure is not None:
            # Requests behind one that was given up do not wait as long once more.
            raise self._failure
        try:
            answers = self._get(references, partial(self._send, users, positions))
        except UserError as error:
            self._failure = error
            raise
        if isinstance(answers[0], ShardRewards):
            return merge_shards(answers)
        # A copy: Ray's own array is read-only.
        return np.array(answers[0])

    def _get(self, references: list[Any], send_again: Callable[[], list[Any]]) -> list[Any]:
        """The answers, after as many retries as they take.

        Raises UserError after the last retry, and at once where an actor raised one.
        """
        failure, silent = "", 0
        for attempt in range(self.retries + 1):
            try:
                share = self.timeout / len(self.actors)
                answers: list[Any] = ray.get(references, timeout=share)
                return answers
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from None
                raise
            except (RayActorError, ObjectLostError, GetTimeoutError) as error:
                # An object is lost when its node dies after it was computed.
                failure = type(error).__name__
                silent += isinstance(error, GetTimeoutError)
            if silent == len(self.actors):
                raise UserError(
                    f"the reward actors gave no answer within launch.timeout_seconds = "
                    f"{self.timeout:g}: they hang, or still load after a restart; look whether "
                    f"their nodes have memory left, {RAISE_OR_DO_WITHOUT}"
                )
            if attempt < self.retries:
                self.meter.retries += 1
                if attempt > 0:
                    # The first retry goes out at once: to another replica, or to the process
                    # that Ray has started in the dead one's place.
                    time.sleep(min(self.backoff * 2 ** (attempt - 1), 10.0))
                references = send_again()
        raise UserError(
            f"the reward actors gave no answer after {self.retries} retries ({failure}); see Ray's "
            "logs, or set cf.rewards=in_process"
        )


def _request_counters(actor: Any) -> list[Any]:
    return [actor.counters.remote()]


@contextmanager
def reward_actor(
    cf: CFConfig,
    folders: RunFolders,
    both_directions: bool,
    nodes: Sequence[str] = (),
    timeout: float = 600.0,
) -> Iterator[None]:
    """The run's reward actors for the length of the block.

    Their counters are left in the run's CF folder when it ends. `both_directions` is
    that of the configuration's `data` section; `nodes` and `timeout` as in
    `reward_actors`.
    """
    with reward_actors(
        folders.cf,
        folders.data,
        folders.items,
        name=reward_actor_name(folders),
        replicas=cf.reward_replicas,
        shards=cf.reward_shards,
        max_restarts=-1,
        both_directions=both_directions,
        nodes=nodes,
        timeout=timeout,
    ):
        yield
        counters = RewardClient(
            reward_actor_name(folders), cf.reward_replicas, cf.reward_shards
        ).counters()
        write_json(folders.cf / "actor-counters.json", counters)


def reward_client(cf: CFConfig, folders: RunFolders, timeout: float) -> RewardClient:
    """A client of the run's reward actors, for a worker; `timeout` in seconds."""
    return RewardClient(
        reward_actor_name(folders),
        cf.reward_replicas,
        cf.reward_shards,
        retries=cf.reward_retries,
        timeout=timeout,
    )


def reward_actor_name(folders: RunFolders) -> str:
    """One name per run folder, so that runs may share a cluster."""
    root = folders.root.resolve()
    return f"rewards-{root.name}-{zlib.crc32(str(root).encode()):08x}"
