"""A batch's rows are the positions whose next token belongs to a target item.

They are dealt over ranks and accumulation steps without loss.
"""

import numpy as np
import pytest

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import make_catalogue, make_title_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.micro_batches import PlannedBatch, micro_batches
from ilrec_dist.samples.prefetch import prefetch
from ilrec_dist.samples.windows import training_windows

RNG = np.random.default_rng(3)
PADDING = 0


@pytest.fixture(scope="module")
def maker() -> BatchMaker:
    lengths = RNG.integers(3, 40, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = RNG.integers(0, 50, offsets[-1]).astype(np.int32)
    dataset = InteractionDataset(
        items, offsets, [str(u) for u in range(60)], [str(i) for i in range(50)]
    )
    catalogue = make_catalogue(RNG.integers(0, 5, (50, 3)), [5, 5, 5])
    return BatchMaker(dataset, catalogue, Trie(catalogue), training_windows(dataset, 8, "all"))


def test_rows_targets_and_candidates_match_the_definition(maker):
    numbers = RNG.permutation(len(maker.windows))[:17]
    batch = maker.make(numbers, step_rows=5)
    depth = maker.catalogue.depth
    expected_rows, expected_targets, width = [], [], batch.tokens.shape[1]
    part = maker.windows.slices(numbers)
    for b, (user, start, target, stop) in enumerate(
        zip(part.user, part.start, part.target, part.stop, strict=True)
    ):
        tokens = maker.catalogue.item_tokens(maker.dataset.sequence(user)[start:stop]).reshape(-1)
        assert (
            batch.tokens[b, : len(tokens) - 1].tolist() == tokens[:-1].tolist()
            or width < len(tokens) - 1
        )
        assert (batch.tokens[b, len(tokens) :] == PADDING).all()
        for place in range(target - start, stop - start):
            for level in range(depth):
                expected_rows.append(b * width + place * depth + level - 1)
                expected_targets.append(tokens[place * depth + level])
    assert batch.rows.tolist() == expected_rows
    assert batch.targets.tolist() == expected_targets
    items = [
        maker.dataset.sequence(u)[p] for u, p in zip(batch.users, batch.positions, strict=True)
    ]
    assert maker.catalogue.item_tokens(np.array(items)).reshape(-1).tolist() == expected_targets
    for row, target in enumerate(expected_targets):
        assert (
            target
            in batch.candidate_tokens[batch.candidate_indptr[row] : batch.candidate_indptr[row + 1]]
        )


def test_titles_are_rows_up_to_their_ends():
    rng = np.random.default_rng(5)
    titles = np.full((50, 5), -1, np.int32)
    for title, length in zip(titles, rng.integers(1, 5, 50), strict=True):
        title[:length], title[length] = rng.integers(1, 8, length), 0
    catalogue = make_title_catalogue(titles, ["<end>", *"abcdefg"])
    offsets = np.cumsum([0, *rng.integers(3, 20, 60)])
    dataset = InteractionDataset(
        rng.integers(0, 50, offsets[-1]).astype(np.int32),
        offsets,
        [str(u) for u in range(60)],
        [str(i) for i in range(50)],
    )
    maker = BatchMaker(dataset, catalogue, Trie(catalogue), training_windows(dataset, 6, "last"))
    numbers = rng.permutation(len(maker.windows))[:23]
    batch, part, row = maker.make(numbers, step_rows=5), maker.windows.slices(numbers), 0
    assert (
        maker.num_rows(numbers) == len(batch.rows)
        and batch.reward_mask is not None
        and batch.grid_index is not None
    )
    all_indptr, all_candidates = maker.trie.target_candidates(
        np.array(
            [dataset.sequence(u)[p] for u, p in zip(batch.users, batch.positions, strict=True)]
        )
    )
    assert batch.reward_mask.sum() == len(batch.candidate_tokens) and len(batch.reward_mask) == len(
        all_candidates
    )
    kept = np.flatnonzero(batch.reward_mask)
    tokens, own = (
        batch.tokens.flatten().tolist(),
        [[number + 1 for number in title.tolist() if number >= 0] for title in titles],
    )
    for b, (user, start, target, stop) in enumerate(
        zip(part.user, part.start, part.target, part.stop, strict=True)
    ):
        items = dataset.sequence(user)[start:stop].tolist()
        sequence = [token for item in items for token in own[item]]
        assert (
            batch.tokens[b].tolist()
            == (sequence + [PADDING] * batch.tokens.shape[1])[: batch.tokens.shape[1]]
        )
        title, history = own[items[target - start]], len(sequence) - len(own[items[-1]])
        assert target == stop - 1
        for place, token in enumerate(title):
            assert (
                batch.targets[row] == token
                and batch.grid_index[row] == b * 5 + place
                and batch.rows[row] == b * batch.tokens.shape[1] + history + place - 1
            )
            assert place == 0 or tokens[batch.rows[row]] == title[place - 1]
            low, high = batch.candidate_indptr[row : row + 2].tolist()
            assert batch.candidate_tokens[low:high].tolist() == sorted(
                {other[place] for other in own if other[:place] == title[:place]}
            )
            reward_row = np.searchsorted(all_indptr, kept[low:high], side="right") - 1
            assert (reward_row == b * 5 + place).all() and batch.candidate_tokens[
                low:high
            ].tolist() == all_candidates[kept[low:high]].tolist()
            row += 1
    assert row == len(batch.rows)


def test_no_windows_give_one_padded_sequence_without_rows(maker):
    batch = maker.make(np.array([], dtype=np.int64), step_rows=3)
    assert (
        batch.tokens.shape[0] == 1
        and len(batch.rows) == len(batch.targets) == 0
        and batch.candidate_indptr.tolist() == [0]
    )


@pytest.mark.parametrize(("dp", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_micro_batches_deal_out_every_window_once(dp, accumulation):
    step = RNG.permutation(100)[:23]
    parts = [part for rank in range(dp) for part in micro_batches(step, rank, dp, accumulation)]
    assert sorted(np.concatenate(parts)) == sorted(step)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_prefetching_keeps_the_order_and_hands_errors_on(maker):
    plan = [PlannedBatch(np.array([i]), i, 1) for i in range(9)]
    assert [ready.batch.step_rows for ready in prefetch(iter(plan), maker.make, None)] == list(
        range(9)
    )

    def broken(numbers, rows):
        raise RuntimeError("no such window")

    with pytest.raises(RuntimeError, match="no such window"):
        next(prefetch(iter(plan), broken, None))


def test_no_windows_of_one_token_items_give_a_column_all_the_same():
    items = RNG.integers(0, 50, 30).astype(np.int32)
    dataset = InteractionDataset(
        items, np.array([0, 12, 30], dtype=np.int64), ["a", "b"], [str(i) for i in range(50)]
    )
    catalogue = make_catalogue(np.arange(50)[:, None], [50])
    batch = BatchMaker(
        dataset, catalogue, Trie(catalogue), training_windows(dataset, 8, "all")
    ).make(np.array([], dtype=np.int64), step_rows=3)
    assert batch.tokens.shape == (1, 1) and len(batch.rows) == 0
