"""Items among any base vocabulary give the
losses and beams of a vocabulary of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference.inputs import HistoryRanges, PlainSequences
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.items.catalogue import Catalogue, make_title_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import NO_TOKEN, Vocabulary
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.windows import training_windows
from tests.support.toy_decoder import NUM_ITEMS, TIED, UNTIED, toy_catalogue, toy_data, toy_titles
from tests.support.whole_model import full_state_dict, load_full_state_dict

MAX_POSITIONS = 60
# With `softmax_scope: all` other tokens compete, so the losses are the same only where there
# are none.
PERMUTED = "the same ids in another order"
FORMS = [
    PERMUTED,
    "a base in front",
    "a base behind",
    "among a base, padded by an item's token",
    "among a base, padded by the end or a base token",
]


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


def vocabulary(form: str, own: Vocabulary) -> Vocabulary:
    count, rng = len(own.item_tokens), np.random.default_rng(9)
    if form == "a base in front" and own.end is None:
        return Vocabulary.added_to(37, 50, count, padding=11)
    if form == "a base in front":
        ids, size, padding = np.arange(37, 37 + count), 50 + count, 11
    elif form == "a base behind":
        ids, size, padding = np.arange(count), count + 20, count + 3
    elif form == PERMUTED:
        size = count + 1
        padding, *ids = rng.permutation(size).tolist()
    else:
        size = count + 40
        ids = rng.permutation(size)[:count]
        padding = int(ids[3])
        if "or" in form:
            padding = int(np.setdiff1d(np.arange(size), ids)[7]) if own.end is None else int(ids[0])
    ids = np.array(ids, np.int32)
    return Vocabulary(ids, size, padding, None if own.end is None else int(ids[0]), size - count)


def transplanted(
    own: Catalogue, other: Catalogue, config: BackboneConfig
) -> tuple[Backbone, Backbone]:
    """A backbone for each catalogue, alike except
    for where the rows of their tokens lie.
    """
    backbones = [
        Backbone(config, catalogue.vocab_size, MAX_POSITIONS, seed=4).eval()
        for catalogue in (own, other)
    ]
    source, target = (full_state_dict(backbone) for backbone in backbones)
    for name, tensor in source.items():
        if "word_embeddings" in name or "output_layer" in name:
            target[name][other.vocabulary.padding] = tensor[own.vocabulary.padding]
            target[name][other.vocabulary.item_tokens] = tensor[own.vocabulary.item_tokens]
        else:
            target[name] = tensor
    load_full_state_dict(backbones[1], target)
    return backbones[0], backbones[1]


def losses(
    catalogue: Catalogue, backbone: Backbone, config: ObjectiveConfig, parallel: ParallelState
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, statistics of the rows) of all windows of the toy data.

    The rewards depend on the item's tokens.
    """
    trie, data = Trie(catalogue), toy_data()
    windows = training_windows(data, 3, "last" if catalogue.pieces else "all")
    maker = BatchMaker(data, catalogue, trie, windows)
    numbers = np.arange(len(windows))
    batch = maker.make(numbers, maker.num_rows(numbers))
    candidates = catalogue.vocabulary.numbers(batch.candidate_tokens.numpy())
    rewards = torch.from_numpy(np.random.default_rng(1).random(1000)[candidates]).float()
    module = CrossLayerObjective.build(backbone, config, catalogue, parallel)
    output = module(
        batch.tokens,
        batch.rows,
        batch.targets,
        batch.candidate_indptr,
        batch.candidate_tokens,
        rewards=rewards,
        loss_scale=1.0,
    )
    names = ("cpo", "cpd", "crr", "p_target", "num_negatives", "capped", "covered")
    return output.loss.detach(), {name: getattr(output.rows, name) for name in names}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [toy_catalogue(), toy_titles()], ids=["codes", "titles"])
def test_losses_do_not_depend_on_where_the_item_tokens_lie(form, own, parallel):
    other = own.in_vocabulary(vocabulary(form, own.vocabulary))
    scopes = [("valid_next", "valid_next"), ("item_tokens", "valid_next")]
    if form == PERMUTED:
        scopes += [("item_tokens", "all"), ("all", "all")]
    for negatives, softmax in scopes:
        config = ObjectiveConfig(
            negative_scope=negatives,
            softmax_scope=softmax,
            max_negatives=5,
            num_intermediate_layers=1,
        )
        found = [
            losses(catalogue, backbone, config, parallel)
            for catalogue, backbone in zip(
                (own, other), transplanted(own, other, UNTIED), strict=True
            )
        ]
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
        for name, values in found[0][1].items():
            torch.testing.assert_close(found[1][1][name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [toy_catalogue(), toy_titles()], ids=["codes", "titles"])
def test_ranked_items_do_not_depend_on_where_the_item_tokens_lie(form, own, parallel):
    other = own.in_vocabulary(vocabulary(form, own.vocabulary))
    data = toy_data()
    histories = HistoryRanges(data.items, data.offsets[:-1], data.offsets[1:])
    for scope in ("valid_next", "all") if form == PERMUTED else ("valid_next",):
        for allowed in (None, np.random.default_rng(2).random(NUM_ITEMS) < 0.5):
            tables = []
            for catalogue, backbone in zip(
                (own, other), transplanted(own, other, TIED), strict=True
            ):
                items = np.full((data.num_users, NUM_ITEMS), -1)
                scores = np.full((data.num_users, NUM_ITEMS), -np.inf)
                model = ModelRanker(
                    backbone,
                    Trie(catalogue),
                    beam=7,
                    batch_size=5,
                    softmax_scope=scope,
                    inputs=PlainSequences(catalogue, 4),
                    parallel=parallel,
                )
                for rows, ranked in model.rank(
                    histories, top=7, exclude_seen=True, allowed=allowed
                ):
                    items[rows, : ranked.items.shape[1]] = ranked.items
                    scores[rows, : ranked.items.shape[1]] = ranked.scores
                tables.append((items, scores))
            assert (tables[0][0] == tables[1][0]).all()
            np.testing.assert_allclose(tables[1][1], tables[0][1], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", [toy_catalogue(), toy_titles()], ids=["codes", "titles"])
def test_a_catalogue_comes_back_from_another_vocabulary_and_from_the_disk(form, own, tmp_path):
    other = own.in_vocabulary(vocabulary(form, own.vocabulary))
    assert (other.codes() == own.codes()).all()
    assert (
        other.item_lengths(np.arange(NUM_ITEMS)) == own.item_lengths(np.arange(NUM_ITEMS))
    ).all()
    names, names_of = own.token_names(), other.token_names()
    assert [
        [names_of[token] for token in tokens if token != NO_TOKEN]
        for tokens in other.item_tokens(np.arange(NUM_ITEMS)).tolist()
    ] == [
        [names[token] for token in tokens if token != NO_TOKEN]
        for tokens in own.item_tokens(np.arange(NUM_ITEMS)).tolist()
    ]
    other.save(tmp_path)
    back = Catalogue.load(tmp_path).in_vocabulary(own.vocabulary)
    assert (back.tokens == own.tokens).all() and (back.items == own.items).all()


def test_added_tokens_take_the_tokenizers_next_ids_and_spare_rows_first():
    small = Vocabulary.added_to(base_size=10, embedding_rows=16, num_item_tokens=4, padding=2)
    assert small.item_tokens.tolist() == [10, 11, 12, 13] and small.size == 16
    large = Vocabulary.added_to(base_size=10, embedding_rows=16, num_item_tokens=9, padding=2)
    assert large.item_tokens.tolist() == list(range(10, 19)) and large.size == 19
    assert small.extended(5).item_tokens.tolist() == large.item_tokens.tolist()
    assert small.extended(5).size == 19
    assert Vocabulary.own(3).extended(2).item_tokens.tolist() == [1, 2, 3, 4, 5]


def test_titles_in_a_tokenizers_own_tokens_end_with_its_end_token():
    tokens = Vocabulary.for_titles(base_size=6, embedding_rows=8, end=2, padding=2)
    catalogue = make_title_catalogue(
        np.array([[4, 0, -1], [1, 6, 0]]), ["<end>", *"abcdef"], tokens
    )
    assert catalogue.item_tokens(np.arange(2)).tolist() == [[3, 2, NO_TOKEN], [0, 5, 2]]
    assert catalogue.codes().tolist() == [[4, 0, -1], [1, 6, 0]]
    assert catalogue.token_names()[2] == "<end>" and catalogue.vocab_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1, 2], 4, 0), "1 of the 3 item tokens share their id"),
        (([1, 2, 4], 4, 0), "token id 4 is outside the vocabulary of 4 ids"),
        (([-1, 2], 4, 0), "token id -1 is outside"),
        (([1, 2], 4, 4), "token id 4 is outside"),
        (([2, 1], 4, 0, 1), "item token 0 is not the end token 1"),
        (([2, 1, 1], 4, 0, 2), "1 of the 3 item tokens share"),
    ],
)
def test_ids_that_cannot_be_are_refused(arguments, message):
    ids, *rest = arguments
    with pytest.raises(ValueError, match=message):
        Vocabulary(np.array(ids, np.int32), *rest)
