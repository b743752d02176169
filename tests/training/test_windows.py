"""Windows make every training item after a user's first a target exactly once.

The order of the steps is a function of seed and epoch.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.samples.windows import EpochSteps, steps_per_epoch, training_windows
from tests.support.tiny_run import tiny_config


def dataset_of(lengths: list[int]) -> InteractionDataset:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.arange(offsets[-1], dtype=np.int32)
    return InteractionDataset(
        items, offsets, [str(u) for u in range(len(lengths))], [str(i) for i in range(len(items))]
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(3, 60), min_size=1, max_size=20),
    st.integers(1, 25),
    st.sampled_from(["all", "last"]),
)
def test_every_training_item_but_the_first_is_a_target_once(lengths, max_history, targets):
    dataset = dataset_of(lengths)
    all_windows = training_windows(dataset, max_history, targets)
    windows = all_windows.slices(np.arange(len(all_windows)))
    found = [
        (int(u), p)
        for u, a, b in zip(windows.user, windows.target, windows.stop, strict=True)
        for p in range(a, b)
    ]
    assert sorted(found) == [(u, p) for u, n in enumerate(lengths) for p in range(1, n - 2)]
    assert (windows.start < windows.target).all() and (windows.target < windows.stop).all()
    assert (windows.stop - windows.start <= max_history + 1).all()
    assert windows.num_targets == len(found)
    # Every target has at least min(the items before it, half of max_history) items of context.
    assert (
        windows.target - windows.start >= np.minimum(windows.target, max(max_history // 2, 1))
    ).all()


@given(st.integers(1, 400), st.integers(1, 64), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_uses_every_window_once_and_is_a_function_of_seed_and_epoch(
    users, batch, seed, epoch
):
    windows = training_windows(
        dataset_of(list(np.random.default_rng(0).integers(4, 30, users))), 20, "all"
    )
    steps = EpochSteps(windows, batch, seed, epoch)
    assert len(steps) == steps_per_epoch(windows, batch)
    assert sorted(np.concatenate(steps)) == list(range(len(windows)))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(steps, EpochSteps(windows, batch, seed, epoch), strict=True)
    )
    assert all(len(step) <= batch for step in steps)


def test_epochs_and_seeds_differ():
    windows = training_windows(dataset_of([10] * 300), 20, "all")
    first = np.concatenate(EpochSteps(windows, 32, 0, 0))
    assert not np.array_equal(first, np.concatenate(EpochSteps(windows, 32, 0, 1)))
    assert not np.array_equal(first, np.concatenate(EpochSteps(windows, 32, 1, 0)))


@pytest.mark.parametrize("targets", ["all", "last"])
def test_users_with_one_training_item_have_no_target(targets):
    assert len(training_windows(dataset_of([3, 3]), 20, targets)) == 0


@pytest.mark.parametrize("targets", ["all", "last"])
def test_the_windows_of_some_users_are_those_among_all(targets):
    dataset = dataset_of([30, 5, 3, 12, 60, 7])
    chosen = np.array([True, False, True, False, True, False])
    everyone, some = (training_windows(dataset, 8, targets, users) for users in (None, chosen))
    slices = everyone.slices(np.arange(len(everyone)))
    expected = everyone.slices(np.flatnonzero(chosen[slices.user]))
    found = some.slices(np.arange(len(some)))
    assert 0 < len(found) < len(everyone)
    for name in ("user", "start", "target", "stop"):
        assert (getattr(found, name) == getattr(expected, name)).all(), name


@pytest.mark.parametrize(("users", "batch"), [(700, 8), (45, 64), (128, 1)])
def test_steps_are_those_of_the_definition(users, batch):
    windows = training_windows(
        dataset_of(list(np.random.default_rng(1).integers(4, 70, users))), 20, "all"
    )
    whole = windows.slices(np.arange(len(windows)))
    rng = np.random.default_rng([5, 2])
    order = rng.permutation(len(windows))
    steps = []
    for low in range(0, len(order), 16 * batch):
        part = order[low : low + 16 * batch]
        part = part[np.argsort((whole.stop - whole.start)[part], kind="stable")]
        steps += [part[i : i + batch] for i in range(0, len(part), batch)]
    expected = [steps[i] for i in rng.permutation(len(steps))]
    assert [step.tolist() for step in EpochSteps(windows, batch, 5, 2)] == [
        step.tolist() for step in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_sample_of_users_is_trained_on_in_every_direction(tiny, both):
    data = {"both_directions": both}
    config, all_of_them = (
        tiny_config(tiny, data=data, train={"users": users}) for users in (20, 0)
    )
    found, whole = (RunArtifacts(c).training_windows(c.train) for c in (config, all_of_them))
    dataset = RunArtifacts(config).dataset
    users = np.unique(found.slices(np.arange(len(found))).user)
    forward = users[users < dataset.num_users]
    assert len(forward) == 20 and (dataset.train_lengths()[forward] > 1).all()
    repeated = users[users >= dataset.num_users] - dataset.num_users
    assert repeated.tolist() == (forward.tolist() if both else [])
    everyone = np.unique(whole.slices(np.arange(len(whole))).user)
    assert set(users) < set(everyone) and len(everyone) > 100 * (1 + both)
    # It does not depend on the training's seed, nor is it that of the validation.
    assert forward.tolist() != RunArtifacts(config).validation_users(20).tolist()
