"""Every item's token sequence, in code order: the items below any prefix
are one range.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import map_array, read_json_object, write_json
from ilrec_dist.common.manifest import MANIFEST, check_hashes, hash_files, verified
from ilrec_dist.items.vocabulary import NO_TOKEN, Vocabulary

FORMAT_VERSION = 3
# What to do about a damaged file of an index folder.
REPAIR = "remove the folder and run `ilrec index` again"
FILES = ("tokens.npy", "items.npy", "position.npy", "item_tokens.npy")


@dataclass(frozen=True)
class Catalogue:
    """Items in code order: sorted by their token ids, items that share a sequence by
    item index.

    Where items are titles (`pieces`), all levels share the item tokens, a title ends
    with the vocabulary's end token, and NO_TOKEN stands behind that up to C.
    """

    # Token ids of each item's sequence, in code order.
    tokens: np.ndarray  # int32 [n, C]
    # The item index at each position of the code order.
    items: np.ndarray  # int32 [n]
    # The position of each item index in the code order.
    position: np.ndarray  # int32 [n]
    level_sizes: tuple[int, ...]  # [C] codes of each level
    level_names: tuple[str, ...]  # [C] the letter in a token's name, such as a in <a_12>
    vocabulary: Vocabulary
    # The text of each item token, that of the end among them; None unless items are titles.
    pieces: tuple[str, ...] | None = None

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def depth(self) -> int:
        """C, tokens per item."""
        return int(self.tokens.shape[1])

    @property
    def vocab_size(self) -> int:
        """V, the size of the language model's vocabulary without rows that pad it for
        tp.
        """
        return self.vocabulary.size

    def level_starts(self) -> np.ndarray:
        """int32 [C]: the number of each level's first item token."""
        if self.pieces is not None:
            return np.zeros(self.depth, np.int32)
        return (np.cumsum(self.level_sizes) - self.level_sizes).astype(np.int32)

    def used_tokens(self) -> np.ndarray:
        """int32: the distinct token ids that occur in some item, ascending."""
        return np.setdiff1d(self.tokens, [NO_TOKEN])

    def item_tokens(self, items: np.ndarray) -> np.ndarray:
        """int32 [..., C] token ids of item indices [...]; NO_TOKEN behind the end of a
        title.
        """
        tokens: np.ndarray = self.tokens[self.position[items]]
        return tokens

    def item_lengths(self, items: np.ndarray) -> np.ndarray:
        """int64 [...]: tokens of each of the item indices [...]; C unless items are
        titles.
        """
        if self.pieces is None:
            return np.full(np.shape(items), self.depth, np.int64)
        return np.asarray(np.count_nonzero(self.item_tokens(items) != NO_TOKEN, axis=-1))

    def codes(self) -> np.ndarray:
        """int32 [n, C] codes by item index; -1 behind the end of a title."""
        codes = self.vocabulary.numbers(self.tokens[self.position])
        codes -= self.level_starts()
        return codes

    def token_names(self) -> dict[int, str]:
        """The text of each item token by its id: <a_0>, <a_1>, …, or the pieces of
        titles.
        """
        names = self.pieces or [
            f"<{name}_{code}>"
            for name, size in zip(self.level_names, self.level_sizes, strict=True)
            for code in range(size)
        ]
        # Backwards, so that the end of a title keeps its name where the tokenizer has it as well.
        return dict(zip(self.vocabulary.item_tokens.tolist()[::-1], names[::-1], strict=True))

    def in_vocabulary(self, vocabulary: Vocabulary) -> Catalogue:
        """The same items with the token ids of another vocabulary, in the order of
        these ids.
        """
        if self.pieces is not None:
            return make_title_catalogue(self.codes(), self.pieces, vocabulary)
        return make_catalogue(self.codes(), self.level_sizes, self.level_names, vocabulary)

    def save(self, folder: str | Path) -> None:
        """Write FILES and catalogue.json (with their SHA-256) into an
        existing folder.
        """
        folder = Path(folder)
        arrays = (self.tokens, self.items, self.position, self.vocabulary.item_tokens)
        for name, array in zip(FILES, arrays, strict=True):
            np.save(folder / name, array)
        write_json(
            folder / "catalogue.json",
            {
                "version": FORMAT_VERSION,
                "items": self.num_items,
                "level_sizes": list(self.level_sizes),
                "level_names": list(self.level_names),
                "vocabulary": {
                    "size": self.vocabulary.size,
                    "base_size": self.vocabulary.base_size,
                    "padding": self.vocabulary.padding,
                    "end": self.vocabulary.end,
                },
                **({} if self.pieces is None else {"pieces": list(self.pieces)}),
                "sha256": hash_files(folder, FILES),
            },
        )

    @staticmethod
    def load(folder: str | Path) -> Catalogue:
        """Map what `save` wrote: processes of one machine share its memory.

        Raises UserError when a file is missing, damaged or of another format.
        """
        folder = Path(folder)
        path = folder / "catalogue.json"
        if not path.exists():
            raise UserError(
                f"{folder}: not a catalogue folder (no catalogue.json); run `ilrec index` first"
            )
        meta = read_json_object(path, REPAIR)
        if meta.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: version {meta.get('version')!r}, expected {FORMAT_VERSION}; "
                f"remove {folder} and run `ilrec index` again"
            )
        if (folder / MANIFEST).exists():
            verified(folder, "catalogue.json", REPAIR)
        check_hashes(folder, meta["sha256"], "catalogue.json", REPAIR)
        tokens, items, position, item_tokens = (map_array(folder / name) for name in FILES)
        return Catalogue(
            tokens,
            items,
            position,
            tuple(meta["level_sizes"]),
            tuple(meta["level_names"]),
            Vocabulary(item_tokens, **meta["vocabulary"]),
            tuple(meta["pieces"]) if "pieces" in meta else None,
        )


def catalogue_hash(catalogue: Catalogue) -> str:
    """SHA-256 of the catalogue's tokens and item order, by which a model knows its
    codes.
    """
    digest = hashlib.sha256(np.ascontiguousarray(catalogue.tokens, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(catalogue.items, dtype="<i4").tobytes())
    return digest.hexdigest()


def make_catalogue(
    codes: np.ndarray,
    level_sizes: Sequence[int],
    level_names: Sequence[str] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Catalogue:
    """Catalogue of int codes [num_items, C], code l of an item in [0, level_sizes[l]).

    Names default to a, b, c, …; the vocabulary to the one of a model trained from
    scratch.
    """
    codes = np.asarray(codes)
    if (
        codes.ndim != 2
        or codes.shape[1] != len(level_sizes)
        or (codes < 0).any()
        or (codes >= np.asarray(level_sizes)).any()
    ):
        raise ValueError(
            f"codes of shape {codes.shape} do not fit levels of {list(level_sizes)} codes"
        )
    num_item_tokens = int(np.sum(level_sizes))
    vocabulary = vocabulary or Vocabulary.own(num_item_tokens)
    if len(vocabulary.item_tokens) != num_item_tokens:
        raise ValueError(
            f"a vocabulary of {len(vocabulary.item_tokens)} item tokens for {num_item_tokens} codes"
        )
    names = tuple(level_names or string.ascii_lowercase[: len(level_sizes)])
    tokens = np.empty(codes.shape, np.int32)
    start = 0
    for level, size in enumerate(level_sizes):
        tokens[:, level] = vocabulary.item_tokens[start : start + size][codes[:, level]]
        start += size
    return _in_code_order(tokens, tuple(map(int, level_sizes)), names, vocabulary, None)


def make_title_catalogue(
    codes: np.ndarray, pieces: Sequence[str], vocabulary: Vocabulary | None = None
) -> Catalogue:
    """Catalogue of titles: item token numbers int [num_items, C], 0 at the end and -1
    behind it.

    pieces: the text of each item token. The vocabulary defaults to that of a model
    trained from scratch. Raises ValueError when it is none for titles of that many
    pieces.
    """
    vocabulary = vocabulary or Vocabulary.own(len(pieces), titles=True)
    if vocabulary.end is None or len(vocabulary.item_tokens) != len(pieces):
        raise ValueError(f"the vocabulary is not one of titles of {len(pieces)} pieces")
    tokens = np.append(vocabulary.item_tokens, np.int32(NO_TOKEN))[codes]
    depth = tokens.shape[1]
    names = tuple(map(str, range(1, depth + 1)))
    return _in_code_order(tokens, (len(pieces),) * depth, names, vocabulary, tuple(pieces))


def _in_code_order(
    tokens: np.ndarray,
    level_sizes: tuple[int, ...],
    level_names: tuple[str, ...],
    vocabulary: Vocabulary,
    pieces: tuple[str, ...] | None,
) -> Catalogue:
    # The sort is stable: items that share their tokens stay in index order.
    order = np.lexsort(tokens.T[::-1]).astype(np.int32)
    position = np.empty(len(order), np.int32)
    position[order] = np.arange(len(order), dtype=np.int32)
    return Catalogue(tokens[order], order, position, level_sizes, level_names, vocabulary, pieces)
