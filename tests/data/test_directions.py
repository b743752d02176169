"""The training items read backwards as well: what is added, and what is not.

A user's two directions stay together.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.checkpoint import data_hash
from ilrec_dist.cf.sasrec.cross_fit import train_cf, user_folds
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.reversed import both_directions
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.samples.windows import training_windows


@pytest.fixture
def dataset() -> InteractionDataset:
    rng = np.random.default_rng(0)
    lengths = np.array([3, 7, 5, 12, 4, 9, 6, 8])
    items = rng.integers(0, 20, lengths.sum()).astype(np.int32)
    return InteractionDataset(
        items,
        np.concatenate([[0], np.cumsum(lengths)]),
        [f"u{u}" for u in range(len(lengths))],
        [str(i) for i in range(20)],
    )


@pytest.mark.parametrize("chronological", [False, True])
def test_the_added_users_have_the_training_items_latest_first_and_nothing_else(
    dataset: InteractionDataset, chronological: bool
) -> None:
    if chronological:
        dataset = replace(
            dataset,
            split_positions=np.stack(
                [dataset.lengths() - 1, np.full(8, -1), dataset.lengths() - 1]
            ).astype(np.int32),
        )
    both, users = both_directions(dataset), dataset.num_users
    assert both.num_users == 2 * users
    for user in range(users):
        assert np.array_equal(both.sequence(user), dataset.sequence(user))
        train = dataset.sequence(user)[: dataset.train_lengths()[user]]
        assert np.array_equal(both.sequence(users + user), train[::-1])
    assert np.array_equal(both.train_lengths(), np.tile(dataset.train_lengths(), 2))
    for split in ("validation", "test"):
        evaluated = dataset.evaluated(split)
        assert np.array_equal(both.evaluated(split), evaluated) and np.array_equal(
            both.targets(split, evaluated), dataset.targets(split, evaluated)
        )


LENGTHS = st.lists(st.integers(0, 9), max_size=12)


def _both_by_definition(dataset: InteractionDataset) -> np.ndarray:
    """All of it in memory: every user's training items are put, turned round, behind
    the data.
    """
    turned = [
        dataset.sequence(user)[:length][::-1] for user, length in enumerate(dataset.train_lengths())
    ]
    return np.concatenate([np.asarray(dataset.items), *turned])


@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1))
def test_items_read_as_if_they_lay_in_memory(lengths: list[int], seed: int) -> None:
    """Users without training items; slices and integers of any shape and sign; the
    hash.

    The hash binds a CF model to what it was trained on.
    """
    rng = np.random.default_rng(seed)
    dataset = InteractionDataset(
        rng.integers(0, 50, sum(lengths)).astype(np.int32),
        np.append(0, np.cumsum(lengths)).astype(np.int64),
        ["u"] * len(lengths),
        ["i"] * 50,
    )
    both, whole = both_directions(dataset), _both_by_definition(dataset)
    assert len(both.items) == len(whole) == both.num_interactions
    for start, stop, step in [
        (None, None, None),
        *rng.integers(-len(whole) - 2, len(whole) + 3, (20, 3)).tolist(),
    ]:
        part = slice(start, stop, step or None)
        assert np.array_equal(both.items[part], whole[part]) and both.items[part].dtype == np.int32
    for shape in [(), (0,), (7,), (3, 5)]:
        if len(whole):
            index = rng.integers(-len(whole), len(whole), shape)
            assert (
                np.array_equal(both.items[index], whole[index])
                and both.items[index].dtype == np.int32
            )
    assert data_hash(both) == data_hash(replace(both, items=whole))


def test_an_index_beyond_the_items_is_refused(dataset: InteractionDataset) -> None:
    items = both_directions(dataset).items
    for index in (len(items), [-len(items) - 1], np.ones(len(items), bool), [0.5]):
        with pytest.raises(IndexError):
            items[index]


def test_ids_twice(dataset: InteractionDataset) -> None:
    ids = both_directions(dataset).user_ids
    assert (
        list(ids) == [*dataset.user_ids] * 2
        and [ids[i] for i in range(-16, 16)] == [*dataset.user_ids] * 4
    )
    assert ids[3:12:4] == ["u3", "u7", "u3"]
    with pytest.raises(IndexError):
        ids[16]


def test_memory_is_the_users_not_the_interactions() -> None:
    users, length = 100, 20_000
    dataset = InteractionDataset(
        np.zeros(users * length, np.int32),
        np.arange(0, (users + 1) * length, length),
        [str(u) for u in range(users)],
        [str(i) for i in range(20)],
    )
    tracemalloc.start()
    try:
        both = both_directions(dataset)
        both.items[np.arange(0, len(both.items), 997)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The items are 8 MB, and as much again turned round.
    assert peak < 400_000


def test_every_training_item_but_one_is_a_target_once_in_each_direction(
    dataset: InteractionDataset,
) -> None:
    both = both_directions(dataset)
    windows = training_windows(both, 4, "all")
    parts = windows.slices(np.arange(len(windows)))
    assert parts.num_targets == 2 * np.maximum(dataset.train_lengths() - 1, 0).sum()
    assert set(parts.user.tolist()) == set(np.flatnonzero(both.train_lengths() > 1).tolist())


def test_a_user_s_two_directions_are_scored_by_one_model_that_saw_neither(
    dataset: InteractionDataset, tmp_path: Path
) -> None:
    """METHOD.md §5, no leak through the weights.

    Another sequence of a user leaves the model that
    scores both of that user's directions bit-equal.
    """
    config = CFConfig(
        hidden_size=8, num_layers=1, num_heads=2, max_history=4, epochs=1, batch_size=4
    )
    folds = user_folds(dataset.user_ids, 2)
    assert len(set(folds)) == 2 and np.array_equal(
        user_folds(both_directions(dataset).user_ids, 2), np.tile(folds, 2)
    )
    catalogue = make_catalogue(np.arange(20)[:, None], [20])
    changed = dataset.items.copy()
    changed[dataset.offsets[3] : dataset.offsets[4]] = changed[
        dataset.offsets[3] : dataset.offsets[4]
    ][::-1]
    for name, items in (("one", dataset.items), ("other", changed)):
        train_cf(config, both_directions(replace(dataset, items=items)), catalogue, tmp_path / name)
    own, others = f"fold{folds[3]}.safetensors", f"fold{1 - folds[3]}.safetensors"
    assert (tmp_path / "one" / own).read_bytes() == (tmp_path / "other" / own).read_bytes()
    assert (tmp_path / "one" / others).read_bytes() != (tmp_path / "other" / others).read_bytes()
