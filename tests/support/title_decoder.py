"""A catalogue of titles of many lengths, and a backbone for it."""

from __future__ import annotations

import numpy as np

from ilrec_dist.inference.inputs import HistoryRanges, PlainSequences
from ilrec_dist.items.catalogue import Catalogue, make_title_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.gpt import Backbone
from tests.support.toy_decoder import TIED

COUNT, PIECES, DEPTH = 40, 7, 6


def toy_titles() -> Catalogue:
    """40 titles of 1 to 5 pieces and the end;
    some are prefixes of others, two are the same.
    """
    rng = np.random.default_rng(8)
    numbers = np.full((COUNT, DEPTH), -1, np.int32)
    for row, length in enumerate(rng.integers(1, DEPTH, COUNT)):
        numbers[row, :length], numbers[row, length] = rng.integers(1, 1 + PIECES, length), 0
    numbers[17] = numbers[5]
    numbers[21, : DEPTH - 1], numbers[21, DEPTH - 1] = 2, 0
    numbers[22] = [2, 2, 0, -1, -1, -1]
    return make_title_catalogue(numbers, ["<end>", *"abcdefg"])


CATALOGUE = toy_titles()
TRIE = Trie(CATALOGUE)
HISTORIES = HistoryRanges(
    np.arange(COUNT), np.array([0, 3, 7, 11, 11]), np.array([3, 7, 11, 12, 15])
)
PLAIN = PlainSequences(CATALOGUE, 4)


def backbone(config=TIED) -> Backbone:
    return Backbone(config, CATALOGUE.vocab_size, 5 * DEPTH - 1, seed=4).eval()
