"""Scores of given items along the trie against
exhaustive scoring and a beam of the catalogue.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference import item_scores
from ilrec_dist.inference.beam_search import beam_search, expand_beams, read_prefixes
from ilrec_dist.inference.inputs import Prefixes
from ilrec_dist.inference.item_scores import score_items
from ilrec_dist.inference.trie_constraint import TrieConstraint
from ilrec_dist.items.trie import Trie
from tests.support import title_decoder
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
HISTORIES = np.random.default_rng(0).integers(0, NUM_ITEMS, (4, 3))


@pytest.fixture(scope="module", autouse=True)
def _layout() -> Iterator[None]:
    initialize_parallel(1, "cpu")
    yield
    destroy_parallel(process_group=True)


@pytest.mark.parametrize("chunk", [1, 1 << 23])
@pytest.mark.parametrize("scope", ["all", "valid_next"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-rope"])
def test_scores_are_those_of_the_definition(
    config, scope: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_scores, "CHUNK_ELEMENTS", {"cpu": chunk})
    backbone = toy_backbone(CATALOGUE, config)
    rng = np.random.default_rng(1)
    items = np.stack([rng.permutation(NUM_ITEMS)[:9] for _ in HISTORIES])
    items[1, 4:] = -1
    items[2, 5] = items[2, 0]
    tokens = CATALOGUE.item_tokens(HISTORIES).reshape(len(HISTORIES), -1).astype(np.int64)
    found = score_items(
        backbone,
        TrieConstraint(TRIE),
        read_prefixes(backbone, Prefixes(torch.from_numpy(tokens))),
        torch.from_numpy(items),
        vocab_size=CATALOGUE.vocab_size,
        softmax_scope=scope,
    ).numpy()
    for row, history in enumerate(HISTORIES):
        expected = exhaustive_scores(backbone, CATALOGUE, TRIE, history, scope)
        listed = items[row] >= 0
        np.testing.assert_allclose(found[row, listed], expected[items[row, listed]], atol=1e-4)
        assert (found[row, ~listed] == -np.inf).all()


@pytest.mark.parametrize("scope", ["all", "valid_next"])
def test_titles_of_many_lengths_score_as_in_a_beam_of_all(scope: str) -> None:
    catalogue, trie = title_decoder.CATALOGUE, title_decoder.TRIE
    constraint, model = TrieConstraint(trie), title_decoder.backbone()
    prefixes = title_decoder.PLAIN.prefixes(title_decoder.HISTORIES, np.array([1]))
    read = read_prefixes(model, prefixes)
    options = {"vocab_size": catalogue.vocab_size, "softmax_scope": scope}
    ranked = expand_beams(
        constraint, beam_search(model, constraint, read, beam=catalogue.num_items, **options)
    )
    found = score_items(
        model, constraint, read, torch.from_numpy(ranked.items.astype(np.int64)), **options
    )
    np.testing.assert_allclose(found.numpy(), ranked.scores, atol=1e-4)


def test_scores_that_are_not_finite_name_the_model() -> None:
    backbone = toy_backbone(CATALOGUE, UNTIED)
    with torch.no_grad():
        backbone.head_weight.fill_(torch.nan)
    with pytest.raises(UserError, match="best.safetensors: its scores are not finite"):
        score_items(
            backbone,
            TrieConstraint(TRIE),
            read_prefixes(backbone, Prefixes(torch.ones(1, 3, dtype=torch.int64))),
            torch.zeros(1, 1, dtype=torch.int64),
            vocab_size=CATALOGUE.vocab_size,
            model_name="best.safetensors",
        )
