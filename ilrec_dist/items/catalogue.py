"""The catalogue: every item's token sequence, stored in code order so that each prefix is one contiguous range of items."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import map_array, read_json_object, sha256_file, write_json

FORMAT_VERSION = 2  # 1 had no position.npy
FILES = ("tokens.npy", "items.npy", "position.npy")
PAD = 0
END = 1  # closes every title where items are titles


@dataclass(frozen=True)
class Catalogue:
    """Items in code order: sorted by code tuple, items that share one by item index. Token 0 is padding; level 0 starts at token 1.

    Where items are titles (`pieces`), all levels share the tokens [1, vocab_size), a title ends with END, and PAD stands behind that up to C.
    """

    tokens: np.ndarray  # int32 [n, C] global token ids of each item's code tuple, in code order
    items: np.ndarray  # int32 [n] item index at each code-order position
    position: np.ndarray  # int32 [n] item index -> code-order position
    level_ranges: tuple[
        tuple[int, int], ...
    ]  # per level: [start, stop) of its token ids; contiguous
    level_names: tuple[str, ...]  # the letter in a token's name, such as a in <a_12>
    pieces: tuple[str, ...] | None = (
        None  # where items are titles: the text of each token, that of PAD and END among them
    )

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def depth(self) -> int:
        """C, tokens per item."""
        return self.tokens.shape[1]

    @property
    def vocab_size(self) -> int:
        """Unpadded; the tokens of items lie in [1, vocab_size)."""
        return self.level_ranges[-1][1]

    def used_tokens(self) -> np.ndarray:
        """int32: the distinct tokens that occur in some item, ascending; codes that no item has are not among them, nor is PAD."""
        return np.setdiff1d(self.tokens, [PAD])

    def item_tokens(self, items: np.ndarray) -> np.ndarray:
        """int32 [..., C] tokens of item indices [...]; PAD behind the end of a title."""
        return self.tokens[self.position[items]]

    def item_lengths(self, items: np.ndarray) -> np.ndarray:
        """int64 [...]: how many tokens each of the item indices [...] has; C unless items are titles."""
        if self.pieces is None:
            return np.full(np.shape(items), self.depth, np.int64)
        return np.count_nonzero(self.item_tokens(items), axis=-1)

    def codes(self) -> np.ndarray:
        """int32 [n, C] codes by item index: tokens less their level's start; -1 behind the end of a title."""
        return self.tokens[self.position] - np.array(
            [start for start, _ in self.level_ranges], np.int32
        )

    def token_names(self) -> list[str]:
        """The vocabulary as text: "<pad>", "<a_0>", "<a_1>", …, or the pieces of titles."""
        if self.pieces is not None:
            return list(self.pieces)
        names = ["<pad>"]
        for name, (start, stop) in zip(self.level_names, self.level_ranges, strict=True):
            names += [f"<{name}_{code}>" for code in range(stop - start)]
        return names

    def save(self, folder: str | Path) -> None:
        """Write tokens.npy, items.npy, position.npy and catalogue.json (with their SHA-256) into an existing folder."""
        folder = Path(folder)
        for name, array in zip(FILES, (self.tokens, self.items, self.position), strict=True):
            np.save(folder / name, array)
        write_json(
            folder / "catalogue.json",
            {
                "version": FORMAT_VERSION,
                "items": self.num_items,
                "level_ranges": [list(bounds) for bounds in self.level_ranges],
                "level_names": list(self.level_names),
                **({} if self.pieces is None else {"pieces": list(self.pieces)}),
                "sha256": {name: sha256_file(folder / name) for name in FILES},
            },
        )

    @staticmethod
    def load(folder: str | Path) -> Catalogue:
        """Map what `save` wrote: processes of one machine share its memory. Raises UserError when a file is missing or damaged."""
        folder = Path(folder)
        if not (folder / "catalogue.json").exists():
            raise UserError(
                f"{folder}: not a catalogue folder (no catalogue.json); run `ilrec index` first"
            )
        meta = read_json_object(folder / "catalogue.json")
        if meta.get("version") not in (1, FORMAT_VERSION):
            raise UserError(
                f"{folder / 'catalogue.json'}: version {meta.get('version')!r}, expected {FORMAT_VERSION}; run `ilrec index` again"
            )
        for name, expected in meta["sha256"].items():
            check_file(folder / name, expected, "catalogue.json")
        tokens, items = map_array(folder / "tokens.npy"), map_array(folder / "items.npy")
        position = (
            map_array(folder / "position.npy")
            if "position.npy" in meta["sha256"]
            else _inverse(items)
        )
        ranges, pieces = (
            tuple((int(a), int(b)) for a, b in meta["level_ranges"]),
            meta.get("pieces"),
        )
        return Catalogue(
            tokens,
            items,
            position,
            ranges,
            tuple(meta["level_names"]),
            None if pieces is None else tuple(pieces),
        )


def check_file(path: Path, expected: str, manifest: str) -> None:
    """Raises UserError when a file of a catalogue's folder is missing or its SHA-256 is not `expected`, which `manifest` holds."""
    if not path.exists() or sha256_file(path) != expected:
        raise UserError(
            f"{path}: missing or damaged (its SHA-256 is not the one in {manifest}); run `ilrec index` again"
        )


def catalogue_hash(catalogue: Catalogue) -> str:
    """SHA-256 of the catalogue's tokens and item order."""
    digest = hashlib.sha256(np.ascontiguousarray(catalogue.tokens, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(catalogue.items, dtype="<i4").tobytes())
    return digest.hexdigest()


def make_catalogue(
    codes: np.ndarray, level_sizes: Sequence[int], level_names: Sequence[str] | None = None
) -> Catalogue:
    """Catalogue of int codes [num_items, C], code l of an item in [0, level_sizes[l]). Names default to a, b, c, …"""
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
    stops = 1 + np.cumsum(level_sizes)
    starts = stops - np.asarray(level_sizes)
    order = np.lexsort(codes.T[::-1]).astype(
        np.int32
    )  # stable, so items that share a tuple stay in index order
    tokens = (codes[order] + starts).astype(np.int32)
    names = (
        tuple(level_names)
        if level_names is not None
        else tuple(string.ascii_lowercase[: len(level_sizes)])
    )
    return Catalogue(
        tokens,
        order,
        _inverse(order),
        tuple((int(a), int(b)) for a, b in zip(starts, stops, strict=True)),
        names,
    )


def make_title_catalogue(tokens: np.ndarray, pieces: Sequence[str]) -> Catalogue:
    """Catalogue of titles: tokens int32 [num_items, C] by item index, in each row tokens of [2, len(pieces)), END, and PAD to the end."""
    order = np.lexsort(tokens.T[::-1]).astype(np.int32)
    levels = range(1, tokens.shape[1] + 1)
    return Catalogue(
        tokens[order],
        order,
        _inverse(order),
        ((1, len(pieces)),) * len(levels),
        tuple(map(str, levels)),
        tuple(pieces),
    )


def _inverse(order: np.ndarray) -> np.ndarray:
    position = np.empty(len(order), np.int32)
    position[order] = np.arange(len(order), dtype=np.int32)
    return position
