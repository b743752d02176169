"""Rewards on disk: the bits that were computed, never wrong or half-written ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cf.rewards.disk_cache import RECORD, CachedRewards, cache_folder
from ilrec_dist.cf.rewards.futures import LatencyMeter
from ilrec_dist.cf.rewards.index import write_code_order
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.trie import Trie
from tests.support.cf_world import CONFIG, World, copy_models, training_targets, with_sequence


class Nobody:
    """A source that must not be asked."""

    def __init__(self) -> None:
        self.meter = LatencyMeter()

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> None:
        raise AssertionError(f"{len(users)} targets were not on disk")


def batches(world: World, size: int = 40) -> list[tuple[np.ndarray, np.ndarray]]:
    users, positions = training_targets(world.dataset)
    order = np.random.default_rng(size).permutation(len(users))
    return [(users[part], positions[part]) for part in np.array_split(order, len(order) // size)]


def by_target(
    world: World, users: np.ndarray, positions: np.ndarray, rewards: np.ndarray
) -> dict[tuple[int, int], bytes]:
    indptr, _ = world.trie.target_candidates(
        world.dataset.items[world.dataset.offsets[users] + positions]
    )
    cuts = indptr[:: world.trie.depth]
    return {
        (int(u), int(p)): rewards[a:b].tobytes()
        for u, p, a, b in zip(users, positions, cuts[:-1], cuts[1:], strict=True)
    }


def filled(world: World, folder: Path) -> dict[tuple[int, int], bytes]:
    cached, plain, stored = (
        CachedRewards(world.rewards(), folder, world.dataset, world.trie),
        world.rewards(),
        {},
    )
    for batch in batches(world):
        rewards = cached.fetch_async(*batch).result()
        assert np.array_equal(rewards, plain.fetch(*batch))
        stored |= by_target(world, *batch, rewards)
    assert cached.meter.cached == 0
    return stored


def test_a_second_epoch_and_a_second_run_read_the_same_bits(world: World, tmp_path: Path) -> None:
    stored = filled(world, tmp_path)
    later = CachedRewards(Nobody(), tmp_path, world.dataset, world.trie)  # type: ignore[arg-type]
    # Another epoch's batches, and the first one's.
    for batch in batches(world, 25) + batches(world):
        assert all(
            stored[target] == found
            for target, found in by_target(
                world, *batch, later.fetch_async(*batch).result()
            ).items()
        )
    assert (
        later.meter.summary()["cached"]
        == later.meter.answers
        == len(batches(world, 25)) + len(batches(world))
    )
    asked = later.fetch_async(*batches(world)[0])
    assert later.meter.cached == later.meter.answers, (
        "answers are counted when they are taken, from disk or not"
    )
    asked.result()
    assert later.meter.cached == later.meter.answers


def test_writers_read_each_other(world: World, tmp_path: Path) -> None:
    one, two = (
        CachedRewards(world.rewards(), tmp_path, world.dataset, world.trie) for _ in range(2)
    )
    first, second = batches(world)[:2]
    one.fetch_async(*first).result()
    two.fetch_async(*second).result()
    mixed = tuple(np.concatenate(parts) for parts in zip(second, first, strict=True))
    one.fetch_async(*mixed).result()
    assert one.meter.cached == 1 and len(list(tmp_path.glob("*.records"))) == 2


def test_damage_and_half_written_ends_are_computed_again(world: World, tmp_path: Path) -> None:
    stored, batch = filled(world, tmp_path), batches(world)[0]
    (values,), (records,) = tmp_path.glob("*.values"), tmp_path.glob("*.records")
    data = bytearray(values.read_bytes())
    # The first batch's first target.
    data[5] ^= 1
    values.write_bytes(data)
    records.write_bytes(records.read_bytes() + b"\0" * (RECORD.itemsize // 2))
    again = CachedRewards(world.rewards(), tmp_path, world.dataset, world.trie)
    assert (
        np.array_equal(again.fetch_async(*batch).result(), world.rewards().fetch(*batch))
        and again.meter.cached == 0
    )
    assert (
        by_target(world, *batch, again.fetch_async(*batch).result()).items() <= stored.items()
        and again.meter.cached == 1
    )
    # As if a crash had lost the last write.
    values.write_bytes(values.read_bytes()[:-4])
    last = batches(world)[-1]
    assert (
        np.array_equal(again.fetch_async(*last).result(), world.rewards().fetch(*last))
        and again.meter.cached == 1
    )


def test_a_record_with_a_flipped_bit_is_computed_again(world: World, tmp_path: Path) -> None:
    filled(world, tmp_path)
    (path,), plain = tmp_path.glob("*.records"), world.rewards()
    whole, asked = path.read_bytes(), batches(world)[:2]
    expected = [plain.fetch(*batch) for batch in asked]
    for field, (kind, place) in RECORD.fields.items():
        # The lowest bit makes another target, or place, of one; the highest an impossible one.
        for byte, bit in ((place, 1), (place + kind.itemsize - 1, 128)):
            damaged = bytearray(whole)
            damaged[byte] ^= bit
            path.write_bytes(damaged)
            cached = CachedRewards(plain, tmp_path, world.dataset, world.trie)
            before = cached.meter.cached
            for batch, answer in zip(asked, expected, strict=True):
                assert np.array_equal(cached.fetch_async(*batch).result(), answer), field
            # The first batch, or, where a record took another target's place, both.
            assert cached.meter.cached - before < len(asked), field
            for written in tmp_path.glob(f"{cached._writer_files.name}.*"):
                written.unlink()


def test_values_that_are_gone_are_computed_again(world: World, tmp_path: Path) -> None:
    filled(world, tmp_path)
    (values,), batch = tmp_path.glob("*.values"), batches(world)[0]
    values.unlink()
    cached = CachedRewards(world.rewards(), tmp_path, world.dataset, world.trie)
    assert np.array_equal(cached.fetch_async(*batch).result(), world.rewards().fetch(*batch))


def test_other_contents_have_another_place(world: World, flat_cf: Path, tmp_path: Path) -> None:
    here = cache_folder(world.cf, world.dataset)
    assert (
        here == cache_folder(world.cf, replace(world.dataset))
        and here.parent == world.cf / "code-order" / "reward-cache"
    )
    sequence = world.dataset.sequence(0)[::-1]
    assert cache_folder(world.cf, with_sequence(world.dataset, 0, sequence)) != here
    shutil.copytree(world.cf, tmp_path / "cf", ignore=shutil.ignore_patterns("reward-cache"))
    assert cache_folder(tmp_path / "cf", world.dataset).name == here.name
    codes = world.catalogue.codes()
    write_code_order(
        CONFIG,
        tmp_path / "cf",
        make_catalogue(np.column_stack([codes, np.arange(len(codes)) % 2]), [4, 4, 4, 2]),
    )
    assert cache_folder(tmp_path / "cf", world.dataset).name != here.name
    other_models = copy_models(flat_cf, tmp_path / "other-cf")
    write_code_order(CONFIG, other_models, world.catalogue)
    assert cache_folder(other_models, world.dataset).name != here.name


def test_rewards_of_other_codes_are_not_taken(world: World, tmp_path: Path) -> None:
    """In a folder of another catalogue's rewards, which its name should rule out.

    A request gets as many rewards as its codes ask for, or none from there.
    """
    filled(world, tmp_path)
    codes = world.catalogue.codes()
    catalogue = make_catalogue(np.column_stack([codes, np.arange(len(codes)) % 2]), [4, 4, 4, 2])
    source, batch = (
        TokenRewards(
            world.rewards().models,
            world.rewards().folds,
            world.dataset,
            catalogue,
            Trie(catalogue),
        ),
        batches(world)[0],
    )
    cached = CachedRewards(source, tmp_path, world.dataset, source.trie)
    assert (
        np.array_equal(cached.fetch_async(*batch).result(), source.fetch(*batch))
        and cached.meter.cached == 0
    )


def test_the_source_s_errors_store_nothing(world: World, tmp_path: Path) -> None:
    cached = CachedRewards(world.rewards(), tmp_path, world.dataset, world.trie)
    with pytest.raises(ValueError, match="position"):
        cached.fetch_async(np.array([0]), np.array([0])).result()
    assert list(tmp_path.iterdir()) == []
