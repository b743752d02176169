"""Renders a sample: a template, a history and a target become tokens with the response marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.prompts.template import Template

Encode = Callable[[str], Sequence[int]]
# Wraps a prompt in a model's chat format: (user's message, system message) -> text that ends where
# the assistant's answer begins.
Chat = Callable[[str, str | None], str]


@dataclass(frozen=True)
class ItemTexts:
    """How items are written.

    Both lists are by item index; None where the items have no such form.
    """

    codes: Sequence[str] | None
    titles: Sequence[str] | None

    def write(self, item: int, form: str) -> str:
        """Item `item` as its codes, its title, or "title codes".

        Raises UserError when the form is missing, as for an item without a title.
        """
        parts = []
        if form in ("titles", "both"):
            parts.append(self._one(self.titles, item, "title"))
        if form in ("codes", "both"):
            parts.append(self._one(self.codes, item, "code"))
        return " ".join(parts)

    @staticmethod
    def _one(texts: Sequence[str] | None, item: int, what: str) -> str:
        text = texts[item] if texts is not None else ""
        if not text:
            raise UserError(f"item {item} has no {what}, which the prompt's template writes")
        return text


@dataclass(frozen=True)
class RenderedSample:
    """A sample as the model reads it (METHOD.md §10).

    tokens: int64 [S], the prompt and then the response.
    response_start: the first token of the response; the rows of the sample are the positions
    response_start - 1 ... S - 2, whose next token belongs to the response.
    text: the prompt's and the response's text.
    dropped_items: how many of the oldest history items the length limit left out.
    """

    tokens: np.ndarray
    response_start: int
    text: tuple[str, str]
    dropped_items: int

    @property
    def rows(self) -> np.ndarray:
        """int64: the positions whose next token is the response's."""
        return np.arange(self.response_start - 1, len(self.tokens) - 1)


def choose_template(templates: Sequence[Template], seed: int, user: int, position: int) -> Template:
    """The template of one target: a function of (seed, user, position in the sequence) alone."""
    return templates[int(np.random.default_rng([seed, user, position]).integers(len(templates)))]


def render(
    template: Template,
    items: Sequence[int],
    target: int,
    texts: ItemTexts,
    encode: Encode,
    *,
    max_tokens: int,
    end_token: int | None = None,
    chat: Chat | None = None,
) -> RenderedSample:
    """Render one sample.

    items: the history, oldest first (task next_item), else ignored: the other tasks ask about the
    target itself. The response is encoded by itself, so that its tokens are those that decoding
    generates, whatever text stands before it; `end_token` closes it where one exists.

    A sample of more than `max_tokens` tokens loses its oldest history items, whole, until it fits.
    Raises UserError when it does not fit without any history, or when a text is missing.
    """
    response = texts.write(target, template.response)
    answer = list(encode(response)) + ([] if end_token is None else [end_token])
    about = list(items) if template.task == "next_item" else [target]
    written = [texts.write(item, template.history) for item in about]
    lowest = 0 if template.task == "next_item" else len(written)

    def prompt_tokens(kept: int) -> tuple[str, list[int]]:
        listed = template.separator.join(written[len(written) - kept :])
        text = template.prompt.format(**{template.placeholder: listed})
        if chat is not None:
            text = chat(text, template.system)
        return text, list(encode(text))

    # The length grows with the number of items, so the largest number that fits is searched for
    # by bisection: a long history is encoded a few times, not once for every dropped item.
    kept, least = len(written), lowest
    text, tokens = prompt_tokens(kept)
    if len(tokens) + len(answer) > max_tokens:
        low, high = least, kept
        while low < high:
            middle = (low + high + 1) // 2
            if len(prompt_tokens(middle)[1]) + len(answer) <= max_tokens:
                low = middle
            else:
                high = middle - 1
        kept = low
        text, tokens = prompt_tokens(kept)
        if len(tokens) + len(answer) > max_tokens:
            raise UserError(
                f"template {template.name}: the prompt without any history and its response have "
                f"{len(tokens) + len(answer)} tokens, the limit is {max_tokens}; shorten the "
                "template or the titles, or raise the limit"
            )
    return RenderedSample(
        np.array(tokens + answer, np.int64), len(tokens), (text, response), len(written) - kept
    )
