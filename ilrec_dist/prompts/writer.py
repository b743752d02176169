"""Writes prompts: a template and items become
text and tokens that fit the length limit.

Texts are tokenized whole, a batch at a time: the tokens of a text are not those of its
pieces, since a tokenizer may merge across their borders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.prompts.tasks import Form
from ilrec_dist.prompts.template import Template

# Token ids of many texts.
Encode = Callable[[Sequence[str]], list[list[int]]]
# Wraps a prompt in a model's chat format: (user's message, system message) -> text that ends where
# the assistant's answer begins.
Chat = Callable[[str, str | None], str]
# Letters of a title that make about one token, for the estimate of a prompt's length.
LETTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class ItemTexts:
    """How items are written, by item index; None where the items have no such form."""

    codes: Sequence[str] | None
    titles: Sequence[str] | None
    # Tokens of the longest item's codes.
    code_tokens: int = 1

    def write(self, item: int, form: Form) -> str:
        """Item `item` as its codes, its title, or "title codes".

        Raises UserError when the form is missing, as for an item without a title.
        """
        parts = []
        if form in ("titles", "both"):
            parts.append(" ".join(self._one(self.titles, item, "title").split()))
        if form in ("codes", "both"):
            parts.append(self._one(self.codes, item, "codes"))
        return " ".join(parts)

    @staticmethod
    def _one(texts: Sequence[str] | None, item: int, what: str) -> str:
        text = texts[item] if texts is not None else ""
        if not text.strip():
            raise UserError(f"item {item} has no {what}, which the prompt's template writes")
        return text


@dataclass(frozen=True)
class PromptRequest:
    """One prompt to write.

    items: the history, oldest first, or the one item that the template asks
    about. reserve: the tokens that the response may take of the limit.
    """

    template: Template
    items: Sequence[int] | np.ndarray
    reserve: int


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it (METHOD.md §10)."""

    text: str
    tokens: list[int]
    # How many of the oldest history items the length limit left out.
    dropped_items: int


class PromptWriter:
    """Writes prompts of at most `max_tokens`
    tokens, that of their responses among them.

    `encode` gives the tokens of whole prompts, start token
    included where the model has one; `encode_response` those of
    words in a response. `end_token` closes responses in words.
    """

    def __init__(
        self,
        texts: ItemTexts,
        encode: Encode,
        encode_response: Encode,
        *,
        max_tokens: int,
        end_token: int | None = None,
        chat: Chat | None = None,
    ) -> None:
        self.texts, self.encode, self.max_tokens = texts, encode, max_tokens
        self.encode_response, self.end_token, self.chat = encode_response, end_token, chat
        # By form of writing, and counted when first asked for.
        self.item_sizes = cache(self._item_sizes)

    def write(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """The prompts, in order.

        One that is too long loses its oldest history items, whole,
        until it and its response fit. Raises UserError when it does
        not fit without any history, or when a text is missing.
        """
        written = [
            [self.texts.write(int(item), request.template.history) for item in request.items]
            for request in requests
        ]
        kept = [len(items) for items in written]
        texts = [self._text(*row) for row in zip(requests, written, kept, strict=True)]
        tokens = self.encode(texts)
        # The length grows with the number of items, so the largest number that fits is searched
        # for by bisection, for all prompts that are too long at once.
        low, high = [0] * len(requests), list(kept)
        too_long = [
            number
            for number, request in enumerate(requests)
            if len(tokens[number]) + request.reserve > self.max_tokens
        ]
        for number in too_long:
            if not requests[number].template.task.has_history:
                raise self._too_long(requests[number], len(tokens[number]))
            # The whole history has been tried.
            high[number] -= 1
        # Nothing is known yet of a prompt without any history.
        open_ = too_long
        best: dict[int, tuple[str, list[int]]] = {}
        while open_:
            middle = {number: (low[number] + high[number] + 1) // 2 for number in open_}
            tried = [self._text(requests[n], written[n], middle[n]) for n in open_]
            for number, text, ids in zip(open_, tried, self.encode(tried), strict=True):
                if len(ids) + requests[number].reserve <= self.max_tokens:
                    low[number], best[number] = middle[number], (text, ids)
                else:
                    high[number] = middle[number] - 1
                    if high[number] < 0:
                        raise self._too_long(requests[number], len(ids))
            open_ = [n for n in open_ if low[n] < high[n] or n not in best]
        for number, (text, ids) in best.items():
            texts[number], tokens[number], kept[number] = text, ids, low[number]
        return [
            Prompt(text, list(ids), len(items) - count)
            for text, ids, items, count in zip(texts, tokens, written, kept, strict=True)
        ]

    def responses(self, items: Sequence[int] | np.ndarray) -> list[list[int]]:
        """The tokens of responses in words: the items' titles and the end token.

        Raises UserError where the model has no end token.
        """
        if self.end_token is None:
            raise UserError(
                "prompts.shares: the model's tokenizer has no end-of-text token (eos_token), "
                "which closes a response in words; leave out the tasks that answer with a title"
            )
        titles = [self.texts.write(int(item), "titles") for item in items]
        return [[*ids, self.end_token] for ids in self.encode_response(titles)]

    def _item_sizes(self, form: Form) -> np.ndarray:
        """int32 [num_items]: about how many tokens each item takes in that form."""
        codes, titles = self.texts.codes, self.texts.titles
        known = codes if titles is None else titles
        assert known is not None
        sizes = np.ones(len(known), np.int32)
        if form in ("titles", "both") and titles is not None:
            sizes += np.fromiter(map(len, titles), np.int32, len(titles)) // LETTERS_PER_TOKEN
        if form in ("codes", "both"):
            sizes += self.texts.code_tokens
        return sizes

    def _text(self, request: PromptRequest, written: Sequence[str], kept: int) -> str:
        template = request.template
        joined = template.separator.join(written[len(written) - kept :])
        text = template.prompt.format(**{template.placeholder: joined})
        return text if self.chat is None else self.chat(text, template.system)

    def _too_long(self, request: PromptRequest, tokens: int) -> UserError:
        without = " without any history" if request.template.task.has_history else ""
        return UserError(
            f"template {request.template.name}: the prompt{without} and its response have "
            f"{tokens + request.reserve} tokens, the limit is {self.max_tokens} "
            "(prompts.max_tokens, or the model's positions); shorten the template or the titles, "
            "or raise the limit"
        )
