"""Item tokens that are added to a pretrained
language model's own tokenizer (METHOD.md §10).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix
from tokenizers import AddedToken, Tokenizer

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.titles import TOKENIZER, load_tokenizer, single_spaced
from ilrec_dist.items.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The folder, beside the catalogue's files, of the extended tokenizer and the model's config.json.
LANGUAGE_MODEL = "language_model"
# Rows of the embedding beyond the tokenizer's tokens, as a share of these: known models have at
# most 0.03.
MOST_SPARE_ROWS = 0.25
# Titles that are tokenized at a time.
TITLES_AT_ONCE = 10_000


@dataclass(frozen=True)
class LanguageModel:
    """What the items need to know of the model whose vocabulary they enter."""

    # A Hugging Face folder.
    folder: Path
    # V₀, the rows of its embedding.
    embedding_rows: int


class ExtendedTokenizer:
    """The model's own tokenizer with the item tokens of a catalogue added in one call.

    Raises UserError where it does not load, has a token of that name already, is not of
    the model's size, or would give the added tokens other ids than those that follow
    its own.
    """

    def __init__(self, model: LanguageModel, names: Sequence[str]) -> None:
        self.model = model
        self.tokenizer = _load(model.folder)
        known = self.tokenizer.get_vocab()
        for name in names:
            if name in known:
                raise UserError(
                    f"{model.folder}: the model's tokenizer has the token {name!r} already (id "
                    f"{known[name]}); give the items' codes other names in items.index"
                )
        base_size = 1 + max(known.values())
        _check_size(model, base_size)
        _add_tokens(self.tokenizer, names, base_size, model.folder)
        self.base_size, self.num_added = base_size, len(names)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of codes, which are the added tokens."""
        return Vocabulary.added_to(
            self.base_size, self.model.embedding_rows, self.num_added, self._padding
        )

    @property
    def title_vocabulary(self) -> Vocabulary:
        """Of titles, which are spelt in the model's
        own tokens and closed by its end of text.

        Raises UserError where the tokenizer has no end of text.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise UserError(
                f"{self.model.folder}: its tokenizer has no end-of-text token (eos_token), which "
                "closes every title (items.form titles)"
            )
        rows = self.model.embedding_rows
        return Vocabulary.for_titles(self.base_size, rows, end, self._padding)

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer itself, as the library of that name has it."""
        tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(tokenizer, Tokenizer):
            raise UserError(f"{self.model.folder}: its tokenizer has no {TOKENIZER} form")
        # A model's file may ask for both; padding would be spelt as part of a title.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @property
    def _padding(self) -> int:
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in tokens if token is not None)

    def save(self, folder: Path) -> None:
        """Write the folder LANGUAGE_MODEL into `folder`."""
        out = folder / LANGUAGE_MODEL
        self.tokenizer.save_pretrained(out)
        if not (out / TOKENIZER).is_file():
            raise UserError(f"{self.model.folder}: its tokenizer has no {TOKENIZER} form")
        shutil.copyfile(self.model.folder / "config.json", out / "config.json")


def _check_size(model: LanguageModel, base_size: int) -> None:
    """Raise UserError for a tokenizer that is
    another model's, as far as its size tells.
    """
    tree, rows = read_json_object(model.folder / "config.json"), model.embedding_rows
    for key in ("bos_token_id", "eos_token_id"):
        ids = tree.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and token >= base_size:
                raise UserError(
                    f"{model.folder}: {key} of config.json is {token}, and the tokenizer's largest "
                    f"id is {base_size - 1}; the tokenizer is of another model"
                )
    if not 0 <= rows - base_size <= MOST_SPARE_ROWS * base_size:
        raise UserError(
            f"{model.folder}: the tokenizer's largest id is {base_size - 1}, and the model has "
            f"{rows} embedding rows; the tokenizer is of another model"
        )


def extend_tokenizer(folder: Path, added: Mapping[int, str]) -> None:
    """Add item tokens, id → name, to the tokenizer that `ExtendedTokenizer.save` wrote.

    `folder` is LANGUAGE_MODEL's. Raises UserError
    where the tokenizer gives them other ids.
    """
    if not added:
        return
    tokenizer = _load(folder)
    _add_tokens(tokenizer, [added[token] for token in sorted(added)], min(added), folder)
    tokenizer.save_pretrained(folder)


def _add_tokens(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], first: int, source: Path
) -> None:
    """Add all tokens in one call; their ids must be `first` and those that follow."""
    # Matched as they are written, and kept when special tokens are left out of a text.
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=False) for n in names])
    if tokenizer.convert_tokens_to_ids(list(names)) != list(range(first, first + len(names))):
        raise UserError(
            f"{source}: the tokenizer does not give added tokens the ids from {first} on"
        )


def title_counts(folder: Path, catalogue: Catalogue, titles: Sequence[str]) -> csr_matrix:
    """How often the titles of the items that carry
    an item token hold each token of the model.

    float64 [I, T], a row an item token, of titles
    by item index; `folder` is LANGUAGE_MODEL's.
    """
    vocabulary = catalogue.vocabulary
    tokenizer = load_tokenizer(folder / TOKENIZER, "backbone.new_tokens")
    items, tokens = [], []
    for start in range(0, len(titles), TITLES_AT_ONCE):
        texts = list(map(single_spaced, titles[start : start + TITLES_AT_ONCE]))
        for item, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
            base_tokens = [token for token in encoding.ids if token < vocabulary.base_size]
            items += [start + item] * len(base_tokens)
            tokens += base_tokens
    by_item = csr_matrix(
        (np.ones(len(items)), (items, tokens)), (catalogue.num_items, vocabulary.base_size)
    )
    numbers = vocabulary.numbers(catalogue.item_tokens(np.arange(catalogue.num_items)))
    carriers = np.repeat(np.arange(catalogue.num_items), catalogue.depth)
    carried = csr_matrix(
        (np.ones(numbers.size), (numbers.ravel(), carriers)),
        (len(vocabulary.item_tokens), catalogue.num_items),
    )
    return csr_matrix(carried @ by_item)


def end_token(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The end of text of the tokenizer in `folder`, None where it has none."""
    token = read_json_object(folder / "tokenizer_config.json").get("eos_token")
    # Older files describe the token by an object.
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def chat_format(folder: Path) -> Callable[[str, str | None], str]:
    """The chat template of the tokenizer in `folder`,
    up to where the assistant's answer begins.

    Takes the user's message and the system message, if there is one. Raises UserError
    where there is no template.
    """
    tokenizer = _load(folder)
    if not tokenizer.chat_template:
        raise UserError(
            "prompts.chat: the model's tokenizer has no chat template; leave prompts.chat out, or "
            "take a model that was tuned to chat"
        )

    def chat(text: str, system: str | None) -> str:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    return chat


def _load(folder: Path) -> PreTrainedTokenizerBase:
    # Inside the function because transformers takes seconds to load.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Damaged files raise all kinds of errors.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: its tokenizer does not load: {reason}") from None
