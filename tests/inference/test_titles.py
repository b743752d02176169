"""Beam search over titles of many lengths
against its definition written with Python loops.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference.beam_search import (
    RankedItems,
    beam_search,
    expand_beams,
    read_prefixes,
)
from ilrec_dist.inference.trie_constraint import ItemSets, TrieConstraint
from ilrec_dist.items.vocabulary import NO_TOKEN
from ilrec_dist.model.gpt import Backbone
from tests.support.title_decoder import (
    CATALOGUE,
    COUNT,
    HISTORIES,
    PLAIN,
    TRIE,
    backbone,
)
from tests.support.toy_decoder import TIED, UNTIED

pytestmark = pytest.mark.slow

# The token id of the end.
END = 1


OWN = [
    tuple(int(token) for token in tokens if token != NO_TOKEN)
    for tokens in CATALOGUE.item_tokens(np.arange(COUNT))
]
SCOPES = ["all", "valid_next"]


@pytest.fixture(scope="module", autouse=True)
def _layout() -> Iterator[None]:
    initialize_parallel(1, "cpu")
    yield
    destroy_parallel(process_group=True)


def log_p(model: Backbone, tokens: list[int], scope: str, children: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = (
            model(torch.tensor([tokens]), torch.tensor([len(tokens) - 1])).final
            @ model.head_weight.T
        )[0].double()
    return logits - logits[
        children if scope == "valid_next" else list(range(CATALOGUE.vocab_size))
    ].logsumexp(0)


def looped(
    model: Backbone, scope: str, history: list[int], beam: int, wanted: set[int]
) -> list[tuple[tuple[int, ...], float]]:
    """(tokens, Σ log p), best first; a title
    that has ended keeps its place and its score.
    """
    prefixes: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while any(prefix[-1:] != (END,) for prefix, _ in prefixes):
        grown = [(prefix, score) for prefix, score in prefixes if prefix[-1:] == (END,)]
        for prefix, score in prefixes:
            if prefix[-1:] != (END,):
                children = sorted({own[len(prefix)] for own in OWN if own[: len(prefix)] == prefix})
                values = log_p(model, [*history, *prefix], scope, children)
                grown += [
                    ((*prefix, token), score + float(values[token]))
                    for token in children
                    if any(OWN[item][: len(prefix) + 1] == (*prefix, token) for item in wanted)
                ]
        prefixes = sorted(grown, key=lambda pair: -pair[1])[:beam]
    return prefixes


def search(
    model: Backbone, constraint: TrieConstraint, scope: str, beam: int, excluded: list[np.ndarray]
) -> tuple[list[list[int]], list[RankedItems]]:
    histories, found = [], []
    for row in range(len(HISTORIES.start)):
        prefixes = PLAIN.prefixes(HISTORIES, np.array([row]))
        taken = ItemSets.of([excluded[row]])
        beams = beam_search(
            model,
            constraint,
            read_prefixes(model, prefixes),
            vocab_size=CATALOGUE.vocab_size,
            beam=beam,
            softmax_scope=scope,
            excluded=taken,
        )  # type: ignore[arg-type]
        histories.append(prefixes.tokens[0].tolist())
        found.append(expand_beams(constraint, beams, taken))
    return histories, found


def test_inputs_are_the_titles_without_padding_and_batches_have_one_length() -> None:
    batches = PLAIN.batches(HISTORIES, 2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(5))
    for rows in batches:
        tokens = PLAIN.prefixes(HISTORIES, rows).tokens
        for row, found in zip(rows, tokens.tolist(), strict=True):
            assert found == [
                token
                for item in range(HISTORIES.stop[row])[-4:]
                if item >= HISTORIES.start[row]
                for token in OWN[item]
            ]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("beam", "config"), [(1, TIED), (4, UNTIED), (COUNT, TIED)], ids=["1", "4-untied-rope", "all"]
)
def test_beams_are_those_of_the_definition(beam: int, scope: str, config) -> None:
    model, rng = backbone(config), np.random.default_rng(beam)
    for allowed in (None, rng.random(COUNT) < 0.5):
        excluded = [
            np.array([], np.int64),
            np.array([5]),
            np.array([5, 17, 22]),
            rng.permutation(COUNT)[:30],
            np.arange(COUNT),
        ]
        histories, found = search(
            model, TrieConstraint(TRIE, allowed=allowed), scope, beam, excluded
        )
        for history, ranked, seen in zip(histories, found, excluded, strict=True):
            wanted = {
                item
                for item in range(COUNT)
                if (allowed is None or allowed[item]) and item not in seen
            }
            expected = looped(model, scope, history, beam, wanted) if wanted else []
            items = ranked.items[0][ranked.items[0] >= 0].tolist()
            assert list(dict.fromkeys(OWN[item] for item in items)) == [own for own, _ in expected]
            assert set(items) == {item for item in wanted if OWN[item] in dict(expected)}
            np.testing.assert_allclose(
                [dict(expected)[OWN[item]] for item in items],
                ranked.scores[0][: len(items)],
                atol=1e-4,
            )
            if beam == COUNT and scope == "valid_next" and len(wanted) == COUNT:
                assert sum(np.exp(score) for _, score in expected) == pytest.approx(1.0)
