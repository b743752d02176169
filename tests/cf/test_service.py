"""The reward service on a real Ray: the bits of this process, counters, and deaths."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from ilrec_dist.cf.rewards import service
from ilrec_dist.cf.rewards.service import (
    RewardActor,
    RewardClient,
    load_rewards,
    reward_actors,
)
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.data.reversed import both_directions as read_both_directions
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.trie import Trie
from tests.support.cf_world import (
    CONFIG,
    World,
    documented_metrics,
    flip_last_byte,
    training_targets,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
    pytest.mark.usefixtures("warm_ray"),
]


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def client(session: None, world: World) -> Iterator[RewardClient]:
    with reward_actors(world.cf, world.data, world.items, name="rewards", max_restarts=5):
        yield RewardClient("rewards")


def pid(client: RewardClient, replica: int = 0) -> int:
    return ray.get(client.actors[replica][0].__ray_call__.remote(lambda _: os.getpid()))


def batches(world: World, size: int = 50) -> list[tuple[np.ndarray, np.ndarray]]:
    users, positions = training_targets(world.dataset)
    return [(users[i : i + size], positions[i : i + size]) for i in range(0, len(users), size)]


def test_same_bits_as_in_process_and_counters_equal_what_was_consumed(
    client: RewardClient, world: World
) -> None:
    local = world.rewards()
    before = client.counters()
    consumed = 0
    pending = [
        (users, positions, client.fetch_async(users, positions))
        for users, positions in batches(world)
    ]
    for users, positions, answer in pending:
        rewards = answer.result()
        assert np.array_equal(rewards, local.fetch(users, positions)) and rewards.flags.writeable
        consumed += len(users)
    after = client.counters()
    assert after["targets"] - before["targets"] == consumed
    assert after["rows"] - before["rows"] == consumed * world.trie.depth
    assert after["calls"] - before["calls"] == len(pending)
    summary = client.meter.summary()
    assert (
        summary["answers"] >= len(pending)
        and summary["latency_p99"] > 0
        and 0 <= summary["queue_depth"] <= len(pending)
    )
    # The loss's, which no actor knows of.
    assert {f"rewards/{name}" for name in summary} == documented_metrics() - {"rewards/coverage"}


def test_an_actor_leaves_the_gpus_of_its_node_to_the_workers(session: None, world: World) -> None:
    """Ray itself hides them from no process; a flat index would go to the first one."""

    folders = world.cf, world.data, world.items

    def load() -> TokenRewards:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        return load_rewards(*folders, None, False)

    sees_all = {"env_vars": {"CUDA_VISIBLE_DEVICES": "0,1"}}
    actor = ray.remote(RewardActor).options(num_cpus=0, runtime_env=sees_all).remote(load, 1)
    try:
        assert ray.get(actor.counters.remote())["calls"] == 0
    finally:
        ray.kill(actor)


def test_killed_between_and_in_the_middle_of_requests(client: RewardClient, world: World) -> None:
    local, todo = world.rewards(), batches(world)
    assert np.array_equal(client.fetch_async(*todo[0]).result(), local.fetch(*todo[0]))
    # Between requests: the counters and the answers are those of the process in its place.
    os.kill(pid(client), signal.SIGKILL)
    assert client.counters()["rows"] == 0
    assert np.array_equal(client.fetch_async(*todo[1]).result(), local.fetch(*todo[1]))
    victim, retries = pid(client), client.meter.retries
    in_flight = [client.fetch_async(*batch) for batch in todo * 2]
    answers = [in_flight.pop(0).result()]
    # In the middle: what is sent while it is stopped cannot have been answered when it dies.
    os.kill(victim, signal.SIGSTOP)
    in_flight += [client.fetch_async(*batch) for batch in todo * 2]
    os.kill(victim, signal.SIGKILL)
    answers += [future.result() for future in in_flight]
    assert client.meter.retries > retries
    for batch, answer in zip(todo * 4, answers, strict=True):
        assert np.array_equal(answer, local.fetch(*batch))


def with_hanging_actors(batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Stop the actors of `pair`, and let them go on: what hangs is given up in time."""
    client = RewardClient("pair", replicas=2, timeout=4)
    victims = [pid(client, replica) for replica in range(2)]
    try:
        os.kill(victims[0], signal.SIGSTOP)
        # The other one answers in its place, whichever is asked first.
        for _ in range(2):
            client.fetch_async(*batch).result()
        os.kill(victims[1], signal.SIGSTOP)
        began = time.monotonic()
        line = "^the reward actors gave no answer within launch.timeout_seconds = 4: they hang"
        with pytest.raises(UserError, match=line):
            client.fetch_async(*batch).result()
        assert time.monotonic() - began < 20
    finally:
        for victim in victims:
            os.kill(victim, signal.SIGCONT)


def test_replicas_share_the_requests_and_stand_in_for_those_that_hang_or_die(
    session: None, world: World, tmp_path: Path
) -> None:
    """The actors read histories in both directions, as `data.both_directions` says."""
    both = read_both_directions(world.dataset)
    train_cf(replace(CONFIG, epochs=1), both, world.catalogue, tmp_path / "cf")
    with pytest.raises(UserError, match="were trained for 240 users, the prepared data has 120"):
        world.rewards(cf=tmp_path / "cf")
    local = world.rewards(both, cf=tmp_path / "cf")
    users, positions = np.arange(100, 140), np.ones(40, np.int64)
    todo = [(users, positions), *batches(world)[:3]]
    with reward_actors(
        tmp_path / "cf",
        world.data,
        world.items,
        name="pair",
        replicas=2,
        max_restarts=0,
        both_directions=True,
    ):
        client = RewardClient("pair", replicas=2, retries=2, backoff=0.05)
        for batch in todo:
            assert np.array_equal(client.fetch_async(*batch).result(), local.fetch(*batch))
        assert [ray.get(actor.counters.remote())["calls"] for (actor,) in client.actors] == [2, 2]
        with pytest.raises(RayTaskError):
            # An error that is no bad input of the user's keeps its traceback.
            client.fetch_async(np.array([0]), np.array([0])).result()
        with_hanging_actors(todo[0])
        for replica, survivors in ((0, 1), (1, 0)):
            os.kill(pid(client, replica), signal.SIGKILL)
            if survivors:
                assert all(
                    np.array_equal(client.fetch_async(*batch).result(), local.fetch(*batch))
                    for batch in todo
                )
        retries = client.meter.retries
        waiting = [client.fetch_async(*batch) for batch in todo]
        with pytest.raises(UserError, match="no answer after 2 retries"):
            waiting[0].result()
        with pytest.raises(UserError, match="no answer after 2 retries"):
            waiting[-1].result()
        # Nothing is tried again behind a failure.
        assert client.meter.retries == retries + 2
    with pytest.raises(UserError, match="no reward actors named"):
        RewardClient("pair-gone")


def test_a_folder_that_does_not_fit_is_refused_at_start_up(
    session: None, world: World, flat_cf: Path, tmp_path: Path
) -> None:
    """One actor shows how a refusal comes out; others are those of what it
    runs first.
    """
    cf = Path(shutil.copytree(flat_cf, tmp_path / "cf"))
    index = cf / "code-order" / "fold1" / "index-0.faiss"
    flip_last_byte(index)
    with (
        pytest.raises(UserError) as error,
        reward_actors(cf, world.data, world.items, name="damaged"),
    ):
        pass
    assert str(error.value).startswith(
        f"the reward actors 'damaged' did not start: {index}: damaged"
    ) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="not a CF folder"):
        load_rewards(tmp_path, world.data, world.items, None, False)
    other = make_catalogue(world.catalogue.codes()[::-1], world.catalogue.level_sizes)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    Trie(other).save(tmp_path / "other")
    with pytest.raises(UserError, match="made for another catalogue"):
        load_rewards(world.cf, world.data, tmp_path / "other", None, False)


@pytest.fixture
def locked_items(world: World, tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """The items' folder, with a file that nobody can read before the call."""
    items = Path(shutil.copytree(world.items, tmp_path / "items"))
    content = (items / "catalogue.json").read_bytes()
    (items / "catalogue.json").unlink()
    os.mkfifo(items / "catalogue.json")

    def unlock() -> None:
        # A reader may open it more than once.
        (items / "new").write_bytes(content)
        with open(items / "catalogue.json", "wb") as pipe:
            (items / "new").rename(items / "catalogue.json")
            pipe.write(content)

    return items, unlock


def test_actors_that_load_slowly_are_spoken_of_and_given_up_in_time(
    session: None,
    world: World,
    locked_items: tuple[Path, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(service, "QUIET_SECONDS", 1.0)
    items, unlock = locked_items
    state = f"0 of 1 reward actors have loaded {world.cf}"
    with (
        pytest.raises(WorkersFailed, match=f"^{state} within launch.timeout_seconds = 3;") as late,
        reward_actors(world.cf, world.data, items, name="slow", timeout=3),
    ):
        pass
    assert "\n" not in str(late.value)
    line = "waiting up to {} s for the reward actors: " + state
    assert capsys.readouterr().out.splitlines() == [line.format(3)]
    timer = threading.Timer(4, unlock)
    timer.start()
    with reward_actors(world.cf, world.data, items, name="slow"):
        batch = batches(world)[0]
        answer = RewardClient("slow").fetch_async(*batch).result()
        assert np.array_equal(answer, world.rewards().fetch(*batch))
    assert "waiting up to 600 s for the reward actors: 0 of 1" in capsys.readouterr().out


def test_shards_are_merged(session: None, world: World, flat_cf: Path) -> None:
    def diverge(actor: RewardActor) -> None:
        for model in actor._rewards.models:
            model.norm.weight.data[0] = float("nan")

    with reward_actors(flat_cf, world.data, world.items, name="shards", shards=2) as actors:
        client, batch = RewardClient("shards", shards=2), batches(world)[0]
        np.testing.assert_allclose(
            client.fetch_async(*batch).result(), world.rewards(cf=flat_cf).fetch(*batch), atol=1e-6
        )
        assert client.counters()["rows"] == len(batch[0]) * world.trie.depth
        # A model that has diverged in the actor is one line in the client, without a retry.
        ray.get([actor.__ray_call__.remote(diverge) for actor in actors])
        with pytest.raises(UserError) as error:
            client.fetch_async(*batch).result()
        assert str(error.value).startswith("the token rewards are not finite")
        assert client.meter.retries == 0
    with (
        pytest.raises(UserError, match="written for 2 shards, not 3"),
        reward_actors(flat_cf, world.data, world.items, name="thirds", shards=3),
    ):
        pass
