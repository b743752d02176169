"""Batches of prompts: their tasks' shares,
rows, candidates and groups are as defined.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue, make_title_catalogue
from ilrec_dist.items.prompt_writer import CodeTexts
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import Vocabulary
from ilrec_dist.prompts.tasks import TASKS
from ilrec_dist.prompts.template import read_templates
from ilrec_dist.prompts.writer import ItemTexts, PromptRequest, PromptWriter
from ilrec_dist.samples.prompt_batches import PromptBatchMaker
from ilrec_dist.samples.prompt_samples import PromptSamples, epoch_length
from ilrec_dist.samples.windows import StepOrder, training_windows

NUM_ITEMS, END, PADDING, LIMIT = 30, 3, 1, 700
TITLES = [f"thing {'big ' * (item % 4)}{item}" for item in range(NUM_ITEMS)]
SHARES = {
    "next_item": 0.4,
    "titles_to_next_codes": 0.1,
    "codes_to_next_title": 0.1,
    "title_to_codes": 0.2,
    "codes_to_title": 0.2,
}


def encode(texts) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def make_dataset() -> InteractionDataset:
    rng = np.random.default_rng(4)
    offsets = np.cumsum([0, *rng.integers(3, 12, 25)])
    items = rng.integers(0, NUM_ITEMS, offsets[-1]).astype(np.int32)
    ids = [f"i{item}" for item in range(NUM_ITEMS)]
    return InteractionDataset(items, offsets, [f"u{u}" for u in range(25)], ids, TITLES)


def make_maker(catalogue: Catalogue, templates: str, shares: dict[str, float]) -> PromptBatchMaker:
    dataset = make_dataset()
    codes = None if catalogue.pieces is not None else CodeTexts(catalogue)
    texts = ItemTexts(codes, TITLES, catalogue.depth)
    writer = PromptWriter(texts, encode, encode, max_tokens=LIMIT, end_token=END)
    chosen = [t for t in read_templates(templates) if shares.get(t.task.name)]
    windows = training_windows(dataset, 5, "last")
    samples = PromptSamples(dataset, windows, chosen, shares, writer, seed=7)
    return PromptBatchMaker(catalogue, Trie(catalogue), samples, writer)


@pytest.fixture(scope="module")
def maker() -> PromptBatchMaker:
    """Items of three codes, behind the 256 bytes that are the words."""
    codes = np.stack(np.unravel_index(np.arange(NUM_ITEMS), (5, 3, 2)), axis=1)
    vocabulary = Vocabulary.added_to(256, 256, 10, PADDING)
    return make_maker(make_catalogue(codes, (5, 3, 2), vocabulary=vocabulary), "lcrec", SHARES)


def test_shares_are_shares_of_samples_and_every_target_is_met_once(maker) -> None:
    samples, total = maker.samples, len(maker.samples)
    assert total == epoch_length(len(samples.windows), SHARES)
    tasks, positions, by_task = Counter(), Counter(), {name: Counter() for name in SHARES}
    for epoch in range(3):
        ids = samples.of_epoch(np.arange(total), epoch)
        for sample in samples.samples(ids):
            name = sample.template.task.name
            tasks[name] += 1
            by_task[name][sample.item] += 1
            if name == "next_item":
                positions[sample.user, sample.position] += 1
            history = samples.dataset.sequence(sample.user)[: max(sample.position, 0)][-5:]
            expected = history.tolist() if TASKS[name].has_history else [sample.item]
            assert sample.shown.tolist() == expected
    for name, share in SHARES.items():
        assert tasks[name] / (3 * total) == pytest.approx(share, abs=0.5 / total)
    assert set(positions.values()) == {3} and len(positions) == len(samples.windows)
    # Over the epochs all items are asked about, about equally often.
    for name in ("title_to_codes", "codes_to_title"):
        counts = by_task[name]
        assert len(counts) == NUM_ITEMS and max(counts.values()) - min(counts.values()) <= 1


def test_templates_are_drawn_by_seed_and_differ_between_epochs(maker) -> None:
    samples, ids = maker.samples, np.arange(60)
    drawn = [sample.template.name for sample in samples.samples(ids)]
    again = PromptSamples(
        samples.dataset, samples.windows, read_templates("lcrec"), SHARES, maker.writer, 7
    )
    other = PromptSamples(
        samples.dataset, samples.windows, read_templates("lcrec"), SHARES, maker.writer, 8
    )
    assert [sample.template.name for sample in again.samples(ids)] == drawn
    assert [sample.template.name for sample in other.samples(ids)] != drawn
    later = samples.samples(samples.of_epoch(ids, 1))
    assert [sample.template.name for sample in later] != drawn
    assert len(set(drawn)) == 3


def test_the_tokens_of_samples_are_known_before_their_batch(maker) -> None:
    """What was written to count them is what the batches are made of."""
    ids = np.random.default_rng(1).permutation(len(maker.samples))[:12]
    alone = [maker.make(ids[n : n + 1], 1) for n in range(len(ids))]
    tokens = maker.num_tokens(ids)
    assert tokens.tolist() == [batch.num_tokens for batch in alone]
    for n, batch in enumerate(alone):
        again = maker.make(ids[n : n + 1], 1)
        assert again.tokens.tolist() == batch.tokens.tolist()
        assert again.rows.tolist() == batch.rows.tolist()
    assert maker.make(ids[:0], 1).tokens.shape[0] == 1


def test_rows_candidates_and_groups_match_the_definition(maker) -> None:
    rng = np.random.default_rng(0)
    ids = maker.samples.of_epoch(rng.permutation(len(maker.samples))[:40], 2)
    batch, catalogue, width = maker.make(ids, 99), maker.catalogue, 0
    samples = maker.samples.samples(ids)
    # Rows stand in the order of their groups: with rewards, without, words.
    kinds = [(s.template.task.is_text, not s.template.task.has_history) for s in samples]
    order = sorted(range(40), key=lambda n: (kinds[n][0], kinds[n][1] and not kinds[n][0]))
    width, row, users = batch.tokens.shape[1], 0, []
    lists = list(zip(batch.candidate_indptr[:-1], batch.candidate_indptr[1:], strict=True))
    own = [tuple(catalogue.item_tokens(np.array(item)).tolist()) for item in range(NUM_ITEMS)]
    counts = Counter()
    for place, number in enumerate(order):
        sample = samples[number]
        is_text = sample.template.task.is_text
        response = [*TITLES[sample.item].encode(), END] if is_text else own[sample.item]
        request = PromptRequest(sample.template, sample.shown, len(response))
        (prompt,) = maker.writer.write([request])
        sequence = [*prompt.tokens, *response[:-1]]
        assert batch.tokens[place].tolist() == sequence + [PADDING] * (width - len(sequence))
        counts[2 if is_text else int(not sample.template.task.has_history)] += len(response)
        if sample.template.task.has_history and not is_text:
            users.append((sample.user, sample.position))
        for step, token in enumerate(response):
            assert batch.targets[row] == token
            assert batch.rows[row] == place * width + len(prompt.tokens) + step - 1
            if not is_text:
                low, high = lists[row]
                prefix = response[:step]
                children = sorted({item[step] for item in own if item[:step] == prefix})
                assert batch.candidate_tokens[low:high].tolist() == children
            row += 1
    assert row == len(batch.rows) == sum(counts.values()) == maker.num_rows(ids)
    assert batch.groups is not None
    assert (batch.groups.rewarded, batch.groups.unrewarded, batch.groups.text) == tuple(
        counts[group] for group in range(3)
    )
    assert len(lists) == counts[0] + counts[1] and batch.num_rewards == lists[counts[0] - 1][1]
    assert list(zip(batch.users, batch.positions, strict=True)) == users
    assert batch.num_tokens == int((batch.tokens != PADDING).sum())


def test_no_samples_give_one_padded_sequence_without_rows(maker) -> None:
    batch = maker.make(np.array([], dtype=np.int64), step_rows=3)
    assert batch.tokens.shape == (1, 1) and len(batch.rows) == len(batch.targets) == 0
    assert batch.num_rewards == 0


def test_titles_end_with_the_end_token_and_have_rewards_up_to_it() -> None:
    rows = np.full((NUM_ITEMS, max(map(len, TITLES)) + 1), -1, np.int32)
    for row, title in zip(rows, TITLES, strict=True):
        row[: len(title)], row[len(title)] = np.frombuffer(title.encode(), np.uint8) + 1, 0
    pieces = ["<end>", *(chr(byte) for byte in range(256))]
    vocabulary = Vocabulary.for_titles(256, 256, END, PADDING)
    maker = make_maker(make_title_catalogue(rows, pieces, vocabulary), "titles", {"next_item": 1.0})
    ids = np.arange(9)
    batch = maker.make(ids, 5)
    samples, depth = maker.samples.samples(ids), maker.catalogue.depth
    targets = [[*TITLES[sample.item].encode(), END] for sample in samples]
    assert batch.targets.tolist() == sum(targets, [])
    grid = [place * depth + step for place, t in enumerate(targets) for step in range(len(t))]
    assert batch.grid_index is not None and batch.grid_index.tolist() == grid
    assert batch.reward_mask is not None and batch.reward_mask.sum() == batch.num_rewards
    # All rows are items with rewards.
    assert batch.groups is None


def test_steps_hold_prompts_of_like_lengths_and_each_sample_once(maker) -> None:
    order = StepOrder(maker.samples, 8, epochs=2, seed=1)
    ids = np.concatenate([order.sample_ids(step) for step in range(order.total_steps)])
    assert sorted(ids.tolist()) == list(range(2 * len(maker.samples)))
    sizes = maker.samples.sizes(ids)
    shown = [sample.shown for sample in maker.samples.samples(ids)]
    assert np.corrcoef(sizes, [len(items) for items in shown])[0, 1] > 0.5
