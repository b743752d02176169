"""The reward service on a real Ray: same bits as in-process, counters, and deaths between and in the middle of requests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from ilrec_dist.cf.rewards.service import RewardClient, reward_actors
from ilrec_dist.cf.sasrec.cross_fit import train_cf
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.reversed import both_directions
from ilrec_dist.items.catalogue import make_catalogue
from tests.cf.conftest import CONFIG, World, documented_metrics, training_targets

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
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
    assert {f"rewards/{name}" for name in summary} == documented_metrics() - {
        "rewards/coverage"
    }  # the loss's, which no actor knows of


def test_killed_between_and_in_the_middle_of_requests(client: RewardClient, world: World) -> None:
    local, todo = world.rewards(), batches(world)
    assert np.array_equal(client.fetch_async(*todo[0]).result(), local.fetch(*todo[0]))
    os.kill(pid(client), signal.SIGKILL)  # between
    assert np.array_equal(client.fetch_async(*todo[1]).result(), local.fetch(*todo[1]))
    victim, retries = pid(client), client.meter.retries
    under_way = [client.fetch_async(*batch) for batch in todo * 2]
    answers = [under_way.pop(0).result()]
    os.kill(
        victim, signal.SIGSTOP
    )  # in the middle: what is sent from here on cannot have been answered when it dies
    under_way += [client.fetch_async(*batch) for batch in todo * 2]
    os.kill(victim, signal.SIGKILL)
    answers += [answer.result() for answer in under_way]
    assert client.meter.retries > retries
    for batch, answer in zip(todo * 4, answers, strict=True):
        assert np.array_equal(answer, local.fetch(*batch))
    os.kill(pid(client), signal.SIGKILL)
    assert client.counters()["rows"] == 0  # of the process that took its place


def test_replicas_share_the_requests_and_stand_in_for_each_other(
    session: None, world: World
) -> None:
    with reward_actors(world.cf, world.data, world.items, name="pair", replicas=2, max_restarts=0):
        client, todo = RewardClient("pair", replicas=2, retries=2, backoff=0.05), batches(world)[:4]
        expected = [client.fetch_async(*batch).result() for batch in todo]
        assert [ray.get(actor.counters.remote())["calls"] for (actor,) in client.actors] == [2, 2]
        for replica, survivors in ((0, 1), (1, 0)):
            os.kill(pid(client, replica), signal.SIGKILL)
            if survivors:
                assert all(
                    np.array_equal(client.fetch_async(*batch).result(), answer)
                    for batch, answer in zip(todo, expected, strict=True)
                )
        retries = client.meter.retries
        waiting = [client.fetch_async(*batch) for batch in todo]
        with pytest.raises(UserError, match="no answer after 2 retries"):
            waiting[0].result()
        with pytest.raises(UserError, match="no answer after 2 retries"):
            waiting[-1].result()
        assert client.meter.retries == retries + 2  # nothing is tried again behind a failure
    with pytest.raises(UserError, match="no reward actors named"):
        RewardClient("pair-gone")


def test_a_folder_that_does_not_fit_is_refused_at_start_up(
    session: None, world: World, tmp_path: Path
) -> None:
    with (
        pytest.raises(UserError, match="not a CF folder"),
        reward_actors(tmp_path, world.data, world.items, name="lost"),
    ):
        pass
    other = make_catalogue(
        world.catalogue.codes()[::-1],
        world.catalogue.level_sizes,
    )
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    with (
        pytest.raises(UserError, match="made for another catalogue"),
        reward_actors(world.cf, world.data, tmp_path / "other", name="other"),
    ):
        pass
    train_cf(
        replace(CONFIG, epochs=1, reward_index="flat"),
        world.dataset,
        world.catalogue,
        tmp_path / "cf",
    )
    for name in (
        "fold1.safetensors",
        "code-order/fold1/index-0.faiss",
    ):  # the CF model and the index
        path = tmp_path / "cf" / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with (
            pytest.raises(UserError, match=f"{name}: missing or damaged"),
            reward_actors(tmp_path / "cf", world.data, world.items, name="damaged"),
        ):
            pass
        path.write_bytes(good)
    with reward_actors(tmp_path / "cf", world.data, world.items, name="whole"):
        pass


def test_shards_are_merged(session: None, world: World, tmp_path: Path) -> None:
    train_cf(
        replace(CONFIG, epochs=1, reward_index="flat", reward_shards=2),
        world.dataset,
        world.catalogue,
        tmp_path / "cf",
    )
    with reward_actors(tmp_path / "cf", world.data, world.items, name="shards", shards=2):
        client, batch = RewardClient("shards", shards=2), batches(world)[0]
        np.testing.assert_allclose(
            client.fetch_async(*batch).result(),
            world.rewards(cf=tmp_path / "cf").fetch(*batch),
            atol=1e-6,
        )
        assert client.counters()["rows"] == len(batch[0]) * world.trie.depth
    with (
        pytest.raises(UserError, match="written for 2 shards, not 3"),
        reward_actors(tmp_path / "cf", world.data, world.items, name="thirds", shards=3),
    ):
        pass


def test_actors_know_the_histories_read_backwards(
    session: None, world: World, tmp_path: Path
) -> None:
    both = both_directions(world.dataset)
    train_cf(replace(CONFIG, epochs=1), both, world.catalogue, tmp_path / "cf")
    with pytest.raises(UserError, match="were trained for 240 users, the prepared data has 120"):
        world.rewards(cf=tmp_path / "cf")
    with reward_actors(tmp_path / "cf", world.data, world.items, name="backwards", backwards=True):
        users, positions = np.arange(100, 140), np.ones(40, np.int64)  # of either direction
        found = RewardClient("backwards").fetch_async(users, positions).result()
    np.testing.assert_array_equal(
        found, world.rewards(both, cf=tmp_path / "cf").fetch(users, positions)
    )
