"""The counting baselines, by hand on a toy and against the published rows of the real
data.
"""

from __future__ import annotations

import numpy as np
import pytest

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.evaluation.baselines.counting import (
    count_training,
    popularity_scores,
    transition_scores,
)
from ilrec_dist.evaluation.baselines.table import BaselineInputs
from ilrec_dist.evaluation.ranking import baseline_predictions
from tests.support.real_histories import real_data

# HR@5, HR@10, NDCG@5, NDCG@10, items of the history excluded
PUBLISHED = {
    ("instruments", "popularity"): (0.0341, 0.0507, 0.0278, 0.0330),
    ("instruments", "transitions"): (0.0910, 0.1051, 0.0799, 0.0844),
    ("scientific", "popularity"): (0.0158, 0.0245, 0.0140, 0.0167),
    ("scientific", "transitions"): (0.0864, 0.1044, 0.0724, 0.0781),
}


def toy() -> InteractionDataset:
    sequences = [[0, 1, 2, 3, 4], [1, 2, 1, 2, 0, 3], [5, 4, 3]]
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    return InteractionDataset(
        np.concatenate(sequences).astype(np.int32),
        offsets,
        ["a", "b", "c"],
        [str(item) for item in range(6)],
    )


def test_counts_are_of_the_training_split_alone() -> None:
    counts = count_training(toy())
    assert counts.popularity.tolist() == [1, 3, 3, 0, 0, 1]
    pairs = {
        (int(a), int(b)): int(n)
        for a, b, n in zip(*counts.transitions.nonzero(), counts.transitions.data, strict=True)
    }
    assert pairs == {(0, 1): 1, (1, 2): 3, (2, 1): 1}


@pytest.mark.parametrize("at_once", [1, 4, 6, 7, 100])
def test_counts_do_not_depend_on_how_many_are_read_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("ilrec_dist.evaluation.baselines.counting.CHUNK_INTERACTIONS", at_once)
    test_counts_are_of_the_training_split_alone()
    rng = np.random.default_rng(at_once)
    lengths = rng.integers(0, 9, 60)
    items, offsets = (
        rng.integers(0, 12, lengths.sum()).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    train = rng.integers(0, lengths + 1)
    dataset = InteractionDataset(
        items,
        offsets,
        [""] * 60,
        [""] * 12,
        split_positions=np.stack([train, train, train]).astype(np.int32),
    )
    popularity, pairs = np.zeros(12), np.zeros((12, 12))
    for user, count in enumerate(train):
        sequence = dataset.sequence(user)[:count]
        np.add.at(popularity, sequence, 1)
        np.add.at(pairs, (sequence[:-1], sequence[1:]), 1)
    counts = count_training(dataset)
    assert (
        counts.popularity.tolist() == popularity.tolist()
        and counts.transitions.toarray().tolist() == pairs.tolist()
    )


def test_transition_scores_follow_the_formula() -> None:
    dataset = toy()
    counts = count_training(dataset)
    users = np.array([1, 0, 2])
    table = counts.transitions.toarray()
    for split, last in (("test", 1), ("validation", 2)):
        scores = transition_scores(counts, dataset, users, split)
        for row, user in enumerate(users):
            history = dataset.sequence(user)[:-last][::-1][:6]
            expected = sum(
                (
                    table[item] / (rank * max(counts.popularity[item], 1) ** 0.5)
                    for rank, item in enumerate(history, 1)
                ),
                np.zeros(6),
            )
            np.testing.assert_allclose(scores[row], expected)
    assert popularity_scores(counts, users).tolist() == [[1, 3, 3, 0, 0, 1]] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "method"), PUBLISHED)
def test_published_rows(dataset: str, method: str) -> None:
    """Popularity meets the published row to the last digit.

    Transitions leaves many items with equal scores, whose order
    the published row does not tell: the expected-rank figures must
    meet it, and the rule `split` moves them by what ties can.
    """
    data = real_data(dataset)
    figures = baseline_predictions(
        method,
        BaselineInputs(data, "test"),
        users=np.arange(data.num_users),
        exclude_seen=True,
    ).metrics()
    names = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")
    found, expected = (
        [figures[name] for name in names],
        [figures[f"expected_{name}"] for name in names],
    )
    published = np.array(PUBLISHED[dataset, method])
    if method == "popularity":
        np.testing.assert_allclose(found, published, atol=0.00005)
    else:
        np.testing.assert_allclose(expected, published, atol=0.0008)
        np.testing.assert_allclose(expected[-1], published[-1], atol=0.0002)
        np.testing.assert_allclose(found, published, atol=0.0013)


@pytest.mark.slow
def test_published_transitions_with_history_items_kept() -> None:
    dataset = real_data("instruments")
    kept = baseline_predictions(
        "transitions",
        BaselineInputs(dataset, "test"),
        users=np.arange(dataset.num_users),
        exclude_seen=False,
    ).metrics()
    assert kept["ndcg@10"] == pytest.approx(0.077, abs=0.0005)
