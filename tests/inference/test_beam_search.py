"""Beam search against exhaustive scoring and
against a beam search written with Python loops.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference import beam_search as decoding
from ilrec_dist.inference.beam_search import (
    RankedItems,
    beam_search,
    expand_beams,
    read_prefixes,
)
from ilrec_dist.inference.inputs import Prefixes
from ilrec_dist.inference.trie_constraint import ItemSets, TrieConstraint
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.gpt import Backbone
from tests.support.toy_decoder import (
    NUM_ITEMS,
    TIED,
    UNTIED,
    exhaustive_scores,
    toy_backbone,
    toy_catalogue,
)

CATALOGUE = toy_catalogue()
TRIE = Trie(CATALOGUE)
SCOPES = ["all", "valid_next"]
HISTORIES = np.random.default_rng(0).integers(0, NUM_ITEMS, (4, 3))


@pytest.fixture(scope="module", autouse=True)
def _layout() -> Iterator[None]:
    initialize_parallel(1, "cpu")
    yield
    destroy_parallel(process_group=True)


def search(
    backbone: Backbone,
    constraint: TrieConstraint,
    scope: str,
    beam: int,
    excluded: ItemSets | None = None,
    model_name: str = "the model",
) -> RankedItems:
    tokens = torch.from_numpy(
        CATALOGUE.item_tokens(HISTORIES).reshape(len(HISTORIES), -1).astype(np.int64)
    )
    beams = beam_search(
        backbone,
        constraint,
        read_prefixes(backbone, Prefixes(tokens)),
        vocab_size=CATALOGUE.vocab_size,
        beam=beam,
        softmax_scope=scope,
        excluded=excluded,
        model_name=model_name,
    )
    return expand_beams(constraint, beams, excluded)


def looped_beam_search(
    backbone: Backbone, scope: str, history: np.ndarray, beam: int, wanted: set[int]
) -> list[tuple[tuple[int, ...], float]]:
    """(code tuple, Σ log p), best first, among
    the prefixes that lead to a wanted item.
    """
    prefixes: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    tuples = {
        item: tuple(CATALOGUE.item_tokens(np.array(item)).tolist()) for item in range(NUM_ITEMS)
    }
    for depth in range(CATALOGUE.depth):
        grown = []
        for prefix, score in prefixes:
            tokens = torch.tensor([[*CATALOGUE.item_tokens(history).ravel().tolist(), *prefix]])
            with torch.no_grad():
                logits = (
                    backbone(tokens, torch.tensor([tokens.shape[1] - 1])).final
                    @ backbone.head_weight.T
                )[0].double()
            children = sorted({code[depth] for code in tuples.values() if code[:depth] == prefix})
            scope_tokens = (
                torch.tensor(children)
                if scope == "valid_next"
                else torch.arange(CATALOGUE.vocab_size)
            )
            log_p = logits - logits[scope_tokens].logsumexp(0)
            for token in children:
                if any(tuples[item][: depth + 1] == (*prefix, token) for item in wanted):
                    grown.append(((*prefix, token), score + float(log_p[token])))
        prefixes = sorted(grown, key=lambda pair: -pair[1])[:beam]
    return prefixes


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-rope"])
def test_beam_of_the_whole_catalogue_is_exhaustive(config, scope: str) -> None:
    backbone = toy_backbone(CATALOGUE, config)
    ranked = search(backbone, TrieConstraint(TRIE), scope, NUM_ITEMS)
    _, first, same = np.unique(
        CATALOGUE.item_tokens(np.arange(NUM_ITEMS)), axis=0, return_index=True, return_inverse=True
    )
    for row, history in enumerate(HISTORIES):
        # Items that share a tuple score alike to the last bit.
        scores = exhaustive_scores(backbone, CATALOGUE, TRIE, history, scope)[first[same.ravel()]]
        # Items of equal scores come in item-id order.
        order = np.lexsort((np.arange(NUM_ITEMS), -scores))
        assert ranked.items[row].tolist() == order.tolist()
        np.testing.assert_allclose(ranked.scores[row], scores[order], atol=1e-4)
        total = np.exp(scores[first]).sum()
        assert total == pytest.approx(1.0) if scope == "valid_next" else total < 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beam", [1, 3, 8])
def test_a_small_beam_without_seen_and_not_allowed_items(scope: str, beam: int) -> None:
    backbone = toy_backbone(CATALOGUE)
    rng = np.random.default_rng(beam)
    allowed = rng.random(NUM_ITEMS) < 0.5
    # Seen are a whole first-level subtree, and all but one of the items that share a tuple.
    subtree = np.flatnonzero(CATALOGUE.item_tokens(np.arange(NUM_ITEMS))[:, 0] == 2)
    histories = [
        np.array([], np.int64),
        subtree,
        np.array([3, 7, 33, 3]),
        rng.permutation(NUM_ITEMS)[:50],
    ]
    for mask in (None, allowed):
        constraint = TrieConstraint(TRIE, allowed=mask)
        ranked = search(backbone, constraint, scope, beam, ItemSets.of(histories))
        for row, seen in enumerate(histories):
            wanted = {
                item
                for item in range(NUM_ITEMS)
                if (mask is None or mask[item]) and item not in seen
            }
            expected = looped_beam_search(backbone, scope, HISTORIES[row], beam, wanted)
            items = ranked.items[row][ranked.items[row] >= 0]
            codes = [tuple(CATALOGUE.item_tokens(item).tolist()) for item in items]
            assert list(dict.fromkeys(codes)) == [code for code, _ in expected]
            assert set(items.tolist()) == {
                item
                for item in wanted
                if tuple(CATALOGUE.item_tokens(np.array(item)).tolist()) in dict(expected)
            }
            np.testing.assert_allclose(
                [ranked.scores[row][codes.index(code)] for code, _ in expected],
                [score for _, score in expected],
                atol=1e-4,
            )
            assert (
                np.diff(items)[[a == b for a, b in zip(codes[1:], codes[:-1], strict=True)]] > 0
            ).all()


def test_nothing_left_gives_no_beams() -> None:
    everything = ItemSets.of([np.arange(NUM_ITEMS)] * 3 + [np.arange(NUM_ITEMS - 1)])
    ranked = search(toy_backbone(CATALOGUE), TrieConstraint(TRIE), "all", 5, everything)
    assert ranked.items.tolist() == [[-1]] * 3 + [[NUM_ITEMS - 1]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_an_error_that_names_the_model(
    scope: str, value: float
) -> None:
    """One row of the head is enough, whether its
    token would lead the beams or leave them.
    """
    backbone = toy_backbone(CATALOGUE, UNTIED)
    with torch.no_grad():
        backbone.head_weight[int(CATALOGUE.tokens[0, 0])] = value
    with pytest.raises(UserError, match="ilrec, seed 3: its scores are not finite"):
        search(backbone, TrieConstraint(TRIE), scope, 5, model_name="ilrec, seed 3")


@pytest.mark.parametrize("scope", SCOPES)
def test_slices_and_batches_change_nothing(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, constraint = toy_backbone(CATALOGUE), TrieConstraint(TRIE)
    seen = ItemSets.of(list(HISTORIES))
    whole = search(backbone, constraint, scope, 7, seen)
    # One user is decoded at a time.
    monkeypatch.setattr(decoding, "CHUNK_ELEMENTS", {"cpu": 1})
    sliced = search(backbone, constraint, scope, 7, seen)
    assert np.array_equal(whole.items, sliced.items)
    np.testing.assert_allclose(whole.scores, sliced.scores, rtol=1e-6)
