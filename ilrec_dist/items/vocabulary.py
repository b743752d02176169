"""The language model's vocabulary: which of its
token ids stand for the items (METHOD.md §10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Stands behind the end of a title where token ids are stored. It is no token id: the model's input
# has the padding id there.
NO_TOKEN = -1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The item tokens' ids within a language
    model's vocabulary, whatever else is in it.

    Item tokens are numbered 0 … I-1: the codes of the first level, then those of the
    second, and so on. Where items are titles, number 0 is the end token and number 1 +
    t the tokenizer's token t. Raises ValueError for an id outside the vocabulary and
    for an id that two item tokens share (except the end of a title, which may be one of
    its tokenizer's own tokens).
    """

    # The token id of each item token number.
    item_tokens: np.ndarray  # int32 [I]
    # Token ids are 0 … size-1. The rows that pad the table for tp are not counted.
    size: int
    # It may be any id: padding is never attended to and never a target.
    padding: int
    # This id closes every title; None where items are codes.
    end: int | None = None
    # T, the number of tokens that are not item tokens.
    base_size: int = 0

    def __post_init__(self) -> None:
        ids = self.item_tokens
        used = np.zeros(self.size, bool)
        outside = [self.padding, *([] if self.end is None else [self.end])]
        if len(ids):
            outside += [int(ids.min()), int(ids.max())]
        for token in outside:
            if not 0 <= token < self.size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.size} ids")
        used[ids] = True
        repeated = len(ids) - int(used.sum())
        if self.end is not None and repeated and (ids[1:] == ids[0]).any():
            repeated -= 1
        if repeated:
            raise ValueError(f"{repeated} of the {len(ids)} item tokens share their id with others")
        if self.end is not None and (len(ids) == 0 or ids[0] != self.end):
            raise ValueError(f"item token 0 is not the end token {self.end}")

    @staticmethod
    def own(num_item_tokens: int, titles: bool = False) -> Vocabulary:
        """A vocabulary of items only, of a model
        trained from scratch: padding 0, items from 1.
        """
        ids = np.arange(1, num_item_tokens + 1, dtype=np.int32)
        return Vocabulary(ids, num_item_tokens + 1, 0, 1 if titles else None)

    @staticmethod
    def added_to(
        base_size: int, embedding_rows: int, num_item_tokens: int, padding: int
    ) -> Vocabulary:
        """Item tokens behind a tokenizer's own:
        their ids are T … T+I-1 and V = max(V₀, T+I).

        base_size is T, the tokens of the tokenizer; embedding_rows is V₀ ≥ T, the rows
        of the checkpoint's embedding, whose spare rows become item tokens first.
        """
        stop = base_size + num_item_tokens
        ids = np.arange(base_size, stop, dtype=np.int32)
        return Vocabulary(ids, max(embedding_rows, stop), padding, base_size=base_size)

    @staticmethod
    def for_titles(base_size: int, embedding_rows: int, end: int, padding: int) -> Vocabulary:
        """Titles in a tokenizer's own T tokens,
        one of which is `end`; nothing is added.
        """
        ids = np.concatenate([[end], np.arange(base_size)]).astype(np.int32)
        return Vocabulary(ids, max(embedding_rows, base_size), padding, end, base_size)

    @property
    def added_tokens(self) -> tuple[int, int]:
        """The range of ids of the item tokens that
        are no tokens of the tokenizer itself.
        """
        stop = 1 + int(self.item_tokens.max(initial=self.base_size - 1))
        return self.base_size, max(stop, self.base_size)

    def extended(self, count: int) -> Vocabulary:
        """With `count` more item tokens, whose ids
        follow the largest one of an item token.
        """
        last = int(self.item_tokens.max(initial=self.base_size - 1 if self.base_size else 0))
        ids = np.append(self.item_tokens, np.arange(last + 1, last + 1 + count, dtype=np.int32))
        size = max(self.size, last + 1 + count)
        return Vocabulary(ids, size, self.padding, self.end, self.base_size)

    def numbers(self, tokens: np.ndarray) -> np.ndarray:
        """int32 item token numbers of token ids; -1
        for NO_TOKEN and for ids that are no item's.
        """
        number_of = np.full(self.size + 1, -1, np.int32)
        # Backwards, so that the end of a title is number 0 where the tokenizer has it as well. The
        # last entry stays -1: NO_TOKEN indexes it.
        number_of[self.item_tokens[::-1]] = np.arange(len(self.item_tokens), dtype=np.int32)[::-1]
        numbers: np.ndarray = number_of[tokens]
        return numbers
