"""A run's prompt writer: its items in words,
and the tokenizer of its language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

from tokenizers import Tokenizer

from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.language_model import chat_format, end_token
from ilrec_dist.items.titles import TOKENIZER, load_tokenizer
from ilrec_dist.prompts.writer import ItemTexts, PromptWriter


class CodeTexts(Sequence[str]):
    """Every item's codes as text, by item index, written when they are asked for."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue, self.names = catalogue, catalogue.token_names()

    def __len__(self) -> int:
        return self.catalogue.num_items

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[item] for item in range(*index.indices(len(self)))]
        tokens = self.catalogue.tokens[self.catalogue.position[index]].tolist()
        return "".join(self.names[token] for token in tokens)


def make_prompt_writer(
    folder: Path, catalogue: Catalogue, titles: Sequence[str] | None, max_tokens: int, chat: bool
) -> PromptWriter:
    """The writer of a run whose extended tokenizer lies in `folder` (LANGUAGE_MODEL).

    Raises UserError where the model has no chat template, or no end of text, that is
    asked for.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER, "prompts.templates")
    codes = None if catalogue.pieces is not None else CodeTexts(catalogue)
    return PromptWriter(
        ItemTexts(codes, titles, catalogue.depth),
        # A chat template writes the start token itself.
        _encoder(tokenizer, add_special_tokens=not chat),
        _encoder(tokenizer, add_special_tokens=False),
        max_tokens=max_tokens,
        end_token=end_token(folder, tokenizer),
        chat=chat_format(folder) if chat else None,
    )


def token_texts(folder: Path) -> Callable[[int], str]:
    """The text of each token of the tokenizer in `folder`, special ones included."""
    tokenizer = load_tokenizer(folder / TOKENIZER, "prompts.templates")
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


def _encoder(
    tokenizer: Tokenizer, add_special_tokens: bool
) -> Callable[[Sequence[str]], list[list[int]]]:
    def encode(texts: Sequence[str]) -> list[list[int]]:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    return encode
