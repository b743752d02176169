"""The generated shop: its law, its speed, and that counting cannot reach the true
model.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig, SyntheticConfig
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.data.synthetic.generate import (
    ANYTHING,
    BEGIN_WITHIN,
    COMPANION,
    HABIT,
    MEAN_GAP,
    RETURN,
    bayes_scores,
    draw_histories,
    draw_model,
    draw_times,
    item_table,
)
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.config import ItemsConfig
from tests.support.masks import train_mask, user_of_interaction

SMALL = SyntheticConfig(users=300, items=120, categories=6)


def test_the_same_seed_gives_the_same_folder_and_another_seed_another(tmp_path):
    config = DataConfig(synthetic=SMALL)
    first, again = prepare(config, tmp_path / "a"), prepare(config, tmp_path / "b")
    assert first == again
    other = prepare(
        DataConfig(synthetic=SyntheticConfig(users=300, items=120, categories=6, seed=1)),
        tmp_path / "c",
    )
    assert (
        other["files"]["interactions.parquet"]["sha256"]
        != first["files"]["interactions.parquet"]["sha256"]
    )
    dataset = load_dataset(tmp_path / "a")
    assert (dataset.num_users, dataset.num_items) == (300, 120) and len(dataset.titles) == len(
        dataset.texts
    ) == 120
    assert "true_model.npz" in first["files"]


def test_histories_never_repeat_an_item_and_have_the_stated_lengths():
    model = draw_model(SMALL)
    items, offsets = draw_histories(model, SMALL)
    lengths = np.diff(offsets)
    assert lengths.min() >= 5 and lengths.max() <= 50 and abs(lengths.mean() - 10) < 1
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        assert len(set(items[start:stop].tolist())) == stop - start


def test_a_users_times_increase_as_stated():
    config = SyntheticConfig(users=3000, items=120, categories=6)
    _, offsets = draw_histories(draw_model(config), config)
    times = draw_times(offsets, config)
    first = times[offsets[:-1]]
    assert first.min() >= 0 and first.max() < BEGIN_WITHIN
    assert first.mean() == pytest.approx(BEGIN_WITHIN / 2, rel=0.05)
    gaps = np.delete(np.diff(times), offsets[1:-1] - 1)
    assert gaps.min() >= 1 and gaps.mean() == pytest.approx(MEAN_GAP, rel=0.03)
    # Of an exponential distribution mean and standard deviation are equal.
    assert gaps.std() == pytest.approx(MEAN_GAP, rel=0.05)
    other = draw_times(offsets, replace(config, seed=1))
    assert (times == draw_times(offsets, config)).all() and (times != other).any()


def test_shares_sum_to_one_and_probabilities_too():
    assert COMPANION + RETURN + HABIT + ANYTHING == pytest.approx(1)
    model = draw_model(SMALL)
    items, offsets = draw_histories(model, SMALL)
    histories = [
        items[start : stop - 1] for start, stop in zip(offsets[:20], offsets[1:21], strict=True)
    ]
    probabilities = model.next_probabilities(histories)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    for row, history in zip(probabilities, histories, strict=True):
        assert (row[history] == 0).all() and (np.delete(row, history) > 0).all()


def test_the_drawn_items_follow_the_stated_law():
    """Items drawn after one and the same history come as often as next_probabilities
    says.

    Chi-square, 4 standard deviations.
    """
    config = SyntheticConfig(users=40_000, items=30, categories=3, mean_length=5)
    model = draw_model(config)
    items, offsets = draw_histories(model, config)
    rows = items[offsets[:-1, None] + np.arange(4)]
    pairs, index, count = np.unique(rows[:, :2], axis=0, return_inverse=True, return_counts=True)
    for one in np.argsort(-count)[:3]:
        drawn = np.bincount(rows[index == one, 2], minlength=30)
        expected = model.next_probabilities([pairs[one]])[0] * drawn.sum()
        known = expected > 0
        assert (drawn[~known] == 0).all()
        chi = ((drawn[known] - expected[known]) ** 2 / expected[known]).sum()
        degrees = known.sum() - 1
        assert abs(chi - degrees) < 4 * np.sqrt(2 * degrees)


def test_a_kind_with_nothing_left_gives_way_to_anything():
    model = draw_model(SyntheticConfig(users=5, items=30, categories=3))
    history = np.concatenate([np.flatnonzero(model.kind == 0), np.flatnonzero(model.kind == 1)[:1]])
    probabilities = model.next_probabilities([history])[0]
    assert probabilities.sum() == pytest.approx(1) and (probabilities[history] == 0).all()


def _ndcg(dataset, scores):
    """NDCG@10 per user on the test targets, history excluded, ties in item order
    (METHOD.md §9).
    """
    stops, targets = dataset.history_stop("test"), dataset.targets("test")
    for user in range(dataset.num_users):
        scores[user, dataset.items[dataset.offsets[user] : stops[user]]] = -np.inf
    own = scores[np.arange(len(scores)), targets][:, None]
    rank = (scores > own).sum(1) + (
        (scores == own) & (np.arange(scores.shape[1]) < targets[:, None])
    ).sum(1)
    return np.where(rank < 10, 1 / np.log2(rank + 2), 0.0)


def _transitions(dataset):
    """METHOD.md §9: score(v) = Σ over the last 6 history items i of T[i, v] / (rank_i ·
    √pop_i).
    """
    mask, users = train_mask(dataset), user_of_interaction(dataset)
    follows = mask[1:] & mask[:-1] & (users[1:] == users[:-1])
    counts = np.zeros((dataset.num_items, dataset.num_items))
    np.add.at(counts, (dataset.items[:-1][follows], dataset.items[1:][follows]), 1)
    popularity = np.bincount(dataset.items[mask], minlength=dataset.num_items)
    counts /= np.sqrt(np.maximum(popularity, 1))[:, None]
    stops, scores = (
        dataset.history_stop("test"),
        np.zeros((dataset.num_users, dataset.num_items)),
    )
    for rank in range(1, 7):
        has = np.flatnonzero(dataset.lengths() - 1 >= rank)
        scores[has] += counts[dataset.items[stops[has] - rank]] / rank
    return scores, popularity


def test_popularity_then_transitions_then_the_true_model_each_two_standard_errors_apart(tmp_path):
    start = time.process_time()
    prepare(DataConfig(), tmp_path / "data")
    assert time.process_time() - start < 10, "generation is to take seconds"
    dataset = load_dataset(tmp_path / "data")
    transitions, popularity = _transitions(dataset)
    rows = [
        _ndcg(dataset, np.tile(popularity.astype(float), (dataset.num_users, 1))),
        _ndcg(dataset, transitions),
        _ndcg(
            dataset,
            bayes_scores(tmp_path / "data", dataset, np.arange(dataset.num_users)).astype(float),
        ),
    ]
    for worse, better in zip(rows, rows[1:], strict=False):
        gap, error = (
            better.mean() - worse.mean(),
            np.hypot(better.std(), worse.std()) / np.sqrt(dataset.num_users),
        )
        # There is room on both sides for a trained model.
        assert gap > 4 * error, [row.mean() for row in rows]
    assert 0.15 < rows[2].mean() < 0.30
    assert np.bincount(dataset.items, minlength=dataset.num_items).min() >= 5


def test_texts_put_kinds_into_the_first_code(tmp_path):
    config = SyntheticConfig()
    model = draw_model(config)
    table = item_table(model, config)
    dataset = InteractionDataset(
        np.zeros(1, np.int32),
        np.array([0, 1]),
        ["0"],
        table["id"].to_pylist(),
        table["title"].to_pylist(),
        table["text"].to_pylist(),
    )
    build_catalogue(
        ItemsConfig(levels=2, codes_per_level=128, collisions="resolve"),
        dataset,
        tmp_path / "items",
    )
    first = Catalogue.load(tmp_path / "items").codes()[:, 0]
    table_of = np.zeros((128, len(model.mood)))
    np.add.at(table_of, (first, model.kind), 1)
    assert table_of.max(axis=1).sum() / config.items > 0.9


def test_bayes_needs_the_true_model(tmp_path):
    with pytest.raises(UserError, match="only data.format synthetic has a known true distribution"):
        bayes_scores(tmp_path, None, np.arange(1))
    with pytest.raises(UserError, match=r"data\.synthetic\.items: 5 items for 20 categories"):
        draw_model(SyntheticConfig(items=5))


def test_more_categories_and_kinds_than_there_are_words_still_have_names_of_their_own():
    config = SyntheticConfig(users=5, items=3000, categories=24)
    titles = item_table(draw_model(config), config)
    assert len(set(titles["title"].to_pylist())) == 3000
    assert len({text for text in titles["text"].to_pylist()}) == len(draw_model(config).mood)
