"""Token rewards against brute force; nothing from a target on reaches its reward."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from ilrec_dist.cf.rewards import prefix_mass as scan_module
from ilrec_dist.cf.rewards.layout import num_rewards
from ilrec_dist.cf.rewards.segment_softmax import child_shares
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.cf.sasrec.checkpoint import data_hash, load_cf, load_folds
from ilrec_dist.cf.sasrec.model import window_starts
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import Vocabulary
from tests.support.cf_world import CONFIG, World, training_targets, with_sequence


def brute_force(world: World, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """§5 word by word, in fp64, one item at a time."""
    folds = load_folds(world.cf)
    models = [load_cf(world.cf, f"fold{k}").double() for k in range(2)]
    tokens = world.catalogue.item_tokens(np.arange(world.dataset.num_items))
    out = []
    for user, position in zip(users, positions, strict=True):
        model, sequence = models[folds[user]], world.dataset.sequence(user)
        begin = window_starts(np.array([position]), CONFIG.max_history)[0]
        with torch.no_grad():
            logits = (
                model(torch.from_numpy(sequence[begin:position].astype(np.int64))[None])[0, -1]
                @ model.items.weight.t()
            )
        p = torch.softmax(logits.masked_fill(~model.known, -torch.inf), 0).numpy()
        target = tokens[sequence[position]]
        for depth in range(world.catalogue.depth):
            below = (tokens[:, :depth] == target[:depth]).all(1)
            for token in np.unique(tokens[below, depth]):
                out.append(
                    p[below & (tokens[:, depth] == token)].sum() / max(p[below].sum(), 1e-300)
                )
    return np.array(out)


def test_equals_brute_force(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    users, positions = training_targets(world.dataset)
    # In no order, as a batch comes.
    chosen = np.random.default_rng(0).permutation(len(users))[:150]
    users, positions = users[chosen], positions[chosen]
    expected = brute_force(world, users, positions)
    rewards = world.rewards()
    found = rewards.fetch(users, positions)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    # Many small pieces.
    monkeypatch.setattr(scan_module, "CHUNK_ELEMENTS", 100)
    np.testing.assert_allclose(rewards.fetch(users, positions), expected, atol=1e-6, rtol=0)


def test_aligned_with_the_candidates_and_summing_to_one(world: World) -> None:
    users, positions = training_targets(world.dataset)
    rewards = world.rewards()
    found = rewards.fetch(users, positions)
    indptr, _ = world.trie.target_candidates(
        world.dataset.items[world.dataset.offsets[users] + positions]
    )
    sums = np.add.reduceat(found, indptr[:-1])
    assert len(found) == indptr[-1] and len(sums) == len(users) * world.trie.depth
    # 0: no item of that prefix is known.
    assert np.all((np.abs(sums - 1) < 1e-5) | (sums == 0))
    assert rewards.counters["rows"] == len(sums) and rewards.counters[
        "covered_rows"
    ] == np.count_nonzero(sums)
    assert len(rewards.fetch(users[:0], positions[:0])) == 0


def test_nothing_at_or_after_the_target_changes_a_bit(world: World) -> None:
    """Permute the target and all later items of a user.

    Every earlier reward, and the CF query of the target, keeps its bits.
    """
    lengths = world.dataset.lengths()
    user = int(np.argmax(lengths))
    sequence = world.dataset.sequence(user)
    rng = np.random.default_rng(0)
    positions = np.arange(1, len(sequence))
    for cut in (1, 3, len(sequence) - 2):
        shuffled = np.concatenate([sequence[:cut], np.roll(sequence[cut:], 1)])
        shuffled[cut:] = rng.permutation(shuffled[cut:])
        altered = world.rewards_of_others(with_sequence(world.dataset, user, shuffled))
        early = positions[:cut]
        before = world.rewards().fetch(np.full(len(positions), user), positions)
        after = altered.fetch(np.full(len(positions), user), positions)
        indptr, _ = world.trie.target_candidates(sequence[early])
        size = indptr[(len(early) - 1) * world.trie.depth] if cut >= 1 else 0
        assert np.array_equal(before[:size], after[:size])
        # The target at `cut` is another item now, but its first-code row has the same history,
        # and the same prefix (none).
        first = world.trie.num_nodes(1)
        assert np.array_equal(before[size : size + first], after[size : size + first])


def test_items_the_model_never_saw_get_nothing(world: World) -> None:
    users, positions = training_targets(world.dataset, np.arange(10))
    rewards = world.rewards()
    before = rewards.fetch(users, positions)
    target = int(world.dataset.sequence(0)[1])
    models = [load_cf(world.cf, f"fold{k}") for k in range(2)]
    alone = world.catalogue.item_tokens(np.arange(world.dataset.num_items))
    sharing = (alone == alone[target]).all(1)
    for model in models:
        model.known[torch.from_numpy(sharing)] = False
    blind = TokenRewards(models, rewards.folds, world.dataset, world.catalogue, world.trie)
    after = blind.fetch(users, positions)
    indptr, tokens = world.trie.target_candidates(
        world.dataset.items[world.dataset.offsets[users] + positions]
    )
    row = (
        int(np.flatnonzero((users == 0) & (positions == 1))[0]) * world.trie.depth
        + world.trie.depth
        - 1
    )
    place = (
        indptr[row] + np.flatnonzero(tokens[indptr[row] : indptr[row + 1]] == alone[target][-1])[0]
    )
    assert before[place] > 0 and after[place] == 0 and np.isfinite(after).all()


def test_a_prefix_of_vanishing_mass_keeps_its_digits() -> None:
    scores = np.array([0, -200, -201, -500, -np.inf, -np.inf, 3], np.float32)
    shares = child_shares(
        scores,
        np.array([1, 2, 1, 2, 1]),
        np.array([1, 1, 1, 1, 1, 1, 1]),
        np.array([1, 2, 1, 2, 1]),
    )
    np.testing.assert_allclose(
        shares, [1, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 1, 0, 0, 1], rtol=1e-6
    )


def test_one_level_and_a_thread(world: World) -> None:
    """Atomic ids: one token per item, so r is P_CF itself."""
    codes = np.arange(world.dataset.num_items)[:, None]
    catalogue = make_catalogue(codes, [world.dataset.num_items])
    models = [load_cf(world.cf, f"fold{k}") for k in range(2)]
    rewards = TokenRewards(models, load_folds(world.cf), world.dataset, catalogue, Trie(catalogue))
    users, positions = training_targets(world.dataset, np.arange(5))
    found = rewards.fetch(users, positions)
    assert found.reshape(len(users), -1).sum(1) == pytest.approx(np.ones(len(users)), abs=1e-5)
    pending = rewards.fetch_async(users, positions)
    assert np.array_equal(pending.result(), found)
    assert rewards.meter.summary()["answers"] == 1


def test_rewards_do_not_depend_on_where_the_item_tokens_lie(world: World) -> None:
    """In a vocabulary of ids in another order a target's tokens get the
    same rewards.
    """
    ids = np.random.default_rng(4).permutation(40)[:12].astype(np.int32)
    catalogue = world.catalogue.in_vocabulary(Vocabulary(ids, 40, padding=int(ids[2])))
    trie, own = Trie(catalogue), world.rewards()
    other = TokenRewards(own.models, own.folds, world.dataset, catalogue, trie)
    users, positions = training_targets(world.dataset, np.arange(7))
    items = world.dataset.items[world.dataset.offsets[users] + positions]
    rewards_of = []
    for rewards in (own, other):
        indptr, tokens = rewards.trie.target_candidates(items)
        rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        numbers = rewards.catalogue.vocabulary.numbers(tokens)
        order = np.lexsort((numbers, rows))
        rewards_of.append((numbers[order], rewards.fetch(users, positions)[order]))
    assert (rewards_of[0][0] == rewards_of[1][0]).all()
    np.testing.assert_allclose(rewards_of[1][1], rewards_of[0][1], rtol=1e-4, atol=1e-6)


def chronological(dataset: InteractionDataset) -> np.ndarray:
    """Split positions that train on all but the last three of each user.

    The interactions are the same, the training part is another.
    """
    lengths = dataset.lengths().astype(np.int32)
    return np.stack([np.maximum(lengths - 3, 0), lengths - 2, lengths - 1])


def test_refusals(world: World) -> None:
    rewards = world.rewards()
    for position in (0, len(world.dataset.sequence(0))):
        with pytest.raises(ValueError, match="position"):
            rewards.fetch(np.array([0]), np.array([position]))
    fewer = replace(world.dataset, offsets=world.dataset.offsets[:-1])
    with pytest.raises(UserError, match="users"):
        world.rewards(fewer)
    for others in (
        with_sequence(world.dataset, 3, world.dataset.sequence(3)[::-1]),
        replace(world.dataset, split_positions=chronological(world.dataset)),
    ):
        known, given = data_hash(world.dataset)[:16], data_hash(others)[:16]
        with pytest.raises(
            UserError,
            match=rf"trained on other data of the same size \(SHA-256 {known}…, the prepared "
            rf"data has {given}…\)",
        ):
            world.rewards(others)
    other = make_catalogue(np.zeros((world.dataset.num_items, 3), int), [4, 4, 4])
    with pytest.raises(UserError, match="another catalogue"):
        TokenRewards.open(world.cf, world.dataset, other, Trie(other))


def test_a_training_target_has_the_same_bits_in_any_company(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilrec_dist.cf.rewards.precomputed.BLOCK_USERS", 16)
    users, positions = training_targets(world.dataset)
    one, other = world.rewards(), world.rewards()
    expected = one.fetch(users, positions)
    sizes = num_rewards(world.trie, world.dataset.items[world.dataset.offsets[users] + positions])
    order = np.random.default_rng(0).permutation(len(users))
    starts = np.cumsum(sizes) - sizes
    for batch in np.array_split(order, 7):
        assert np.array_equal(
            other.fetch(users[batch], positions[batch]),
            expected[ragged_ranges(starts[batch], sizes[batch])],
        )
    assert (
        other.counters["targets"] == len(users)
        and other.counters["calls"] == 7
        and other.counters["covered_rows"] == one.counters["covered_rows"]
    )
    direct = world.rewards()
    monkeypatch.setattr("ilrec_dist.cf.rewards.precomputed.LIMIT_BYTES", 0)
    np.testing.assert_allclose(direct.fetch(users, positions), expected, atol=1e-6)
    assert (
        direct._precomputed is None
        and direct.counters["covered_rows"] == one.counters["covered_rows"]
    )
    # The test targets are computed when asked for.
    last = world.dataset.lengths() - 1
    assert not one._precomputed.holds(np.arange(len(last)), last)
    monkeypatch.undo()
    np.testing.assert_allclose(
        one.fetch(np.arange(5), last[:5]), direct.fetch(np.arange(5), last[:5]), atol=1e-6
    )


def test_what_is_learnt_ahead_has_the_bits_of_what_is_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilrec_dist.cf.rewards.precomputed.BLOCK_USERS", 16)
    users, positions = training_targets(world.dataset)
    ahead, asked = world.rewards(), world.rewards()
    ahead.precompute_in_background(1)
    # Beside the thread.
    found = ahead.fetch(users, positions)
    assert np.array_equal(found, asked.fetch(users, positions))
    alone = world.rewards()
    alone.precompute_in_background(1)
    for thread in threading.enumerate():
        if thread.name == "precompute-rewards":
            thread.join(60)
    assert alone._precomputed.computed.all()
    # Nothing is left to compute.
    monkeypatch.setattr(alone._precomputed, "_compute_block", None)
    assert np.array_equal(alone.fetch(users, positions), found) and alone.counters["calls"] == 1
