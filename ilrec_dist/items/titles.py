"""Items as their titles: the tokens of a tokenizer and an end token (METHOD.md §1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_title_catalogue
from ilrec_dist.items.vocabulary import Vocabulary

# The tokenizer's file lies beside the catalogue's.
TOKENIZER = "tokenizer.json"
# The item token numbers of titles (see Vocabulary): the end, and the tokenizer's token 0.
END_NUMBER, FIRST_NUMBER = 0, 1
END_NAME = "<end>"
# Tokens that a vocabulary learned from the titles has besides the tokenizer's: padding and the end.
RESERVED = 2


def train_tokenizer(titles: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn byte-level BPE of at most vocab_size - RESERVED tokens from the titles.

    All bytes are among the tokens, so that a later item's title can be spelt too.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        titles,
        trainers.BpeTrainer(
            vocab_size=vocab_size - RESERVED, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def load_tokenizer(path: str | Path, what: str) -> Tokenizer:
    """Load a tokenizer.json as Hugging Face models
    have it, without its padding and truncation.

    Raises UserError, which says `what` asked for it, when there is none or it does not
    load.
    """
    path = require_file(path, what)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises nothing narrower.
    except Exception as error:
        raise UserError(
            f"{path}: not a tokenizer.json ({what}): {str(error).splitlines()[0]}"
        ) from None
    # A model's file may ask for both; padding would be spelt as part of a title.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def spell(tokenizer: Tokenizer, titles: Sequence[str], title_tokens: int) -> np.ndarray:
    """Item token numbers int32 [n, C] of n titles:
    at most `title_tokens` of each and the end.

    Behind the end stands -1 up to C, which the longest title needs. What looks like a
    special token in a title, such as the end of text, is spelt as the text that it is.
    """
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch(list(map(single_spaced, titles)), add_special_tokens=False)
    ids = [encoding.ids[:title_tokens] for encoding in encodings]
    numbers = np.full((len(ids), 1 + max(map(len, ids), default=0)), -1, np.int32)
    for row, title in enumerate(ids):
        numbers[row, : len(title)] = title
        numbers[row, : len(title)] += FIRST_NUMBER
        numbers[row, len(title)] = END_NUMBER
    return numbers


def required_titles(dataset: InteractionDataset) -> list[str]:
    """The titles by item index, with single spaces.

    Raises UserError naming the first item without a title.
    """
    titles = list(map(single_spaced, dataset.titles or [""] * dataset.num_items))
    untitled = [item for item, title in enumerate(titles) if not title]
    if untitled:
        raise UserError(
            f"items.form titles: item {dataset.item_ids[untitled[0]]!r} has no title "
            f"({len(untitled)} of {len(titles)} items have none); give every item one in the item "
            "table (data.items_path), or choose another items.form"
        )
    return titles


def title_catalogue(
    titles: Sequence[str],
    tokenizer: Tokenizer,
    title_tokens: int,
    vocabulary: Vocabulary | None = None,
) -> Catalogue:
    """The catalogue of titles, by item index, in the tokens of a tokenizer.

    vocabulary: that of a language model whose tokenizer it is; None for a model trained
    from scratch.
    """
    names = {number: piece for piece, number in tokenizer.get_vocab().items()}
    pieces = [
        names.get(number, f"<{number + RESERVED}>") for number in range(max(names, default=-1) + 1)
    ]
    end = END_NAME if vocabulary is None or vocabulary.end is None else pieces[vocabulary.end]
    numbers = spell(tokenizer, titles, title_tokens)
    return make_title_catalogue(numbers, [end, *pieces], vocabulary)


def single_spaced(title: str) -> str:
    """One space between words, none around them."""
    return " ".join(title.split())
