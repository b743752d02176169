"""NAME.index.json: item id → code tokens such as ["<a_128>", "<b_241>"]; read and
written back.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.json_stream import stream_json_object
from ilrec_dist.common.manifest import verified
from ilrec_dist.items.catalogue import REPAIR, Catalogue
from ilrec_dist.items.vocabulary import NO_TOKEN

# Beside the catalogue's files.
INDEX = "index.json"
TOKEN = re.compile(r"<([A-Za-z]+)_([0-9]{1,7})>")


@dataclass(frozen=True)
class IndexFile:
    """The codes of a NAME.index.json."""

    codes: np.ndarray  # int32 [num_items, C]
    level_sizes: list[int]  # [C]: the largest code of each level plus one
    level_names: list[str]  # [C]
    # The number of items of the file that the data set does not have.
    items_passed_over: int


def read_index(path: str | Path, item_ids: Iterable[str] | None = None) -> IndexFile:
    """Read the codes of `item_ids` in that order (None: of all items, as the file has
    them).

    Items of the file that are not among `item_ids` are passed over, but count towards
    the level sizes. Raises UserError naming file and item for an item without a code, a
    token that is not of the form <a_128>, or a code of another length.
    """
    path = Path(path)
    names: list[str] = []
    flat = array("i")
    row_of: dict[str, int] = {}
    first: tuple[str, list[str]] = ("", [])
    for item, tokens in stream_json_object(path):
        if not isinstance(tokens, list) or not tokens:
            raise UserError(
                f"{path}: item {item!r}: expected a list of code tokens, found {tokens!r}"
            )
        if not row_of:
            first = item, tokens
        if len(tokens) != len(first[1]):
            raise UserError(
                f"{path}: item {item!r} has {len(tokens)} codes, item {first[0]!r} has "
                f"{len(first[1])}; all items need as many"
            )
        for level, token in enumerate(tokens):
            match = TOKEN.fullmatch(token) if isinstance(token, str) else None
            if match is None:
                raise UserError(f"{path}: item {item!r}: code {token!r} is not of the form <a_128>")
            if not row_of:
                names.append(match[1])
            elif match[1] != names[level]:
                raise UserError(
                    f"{path}: item {item!r}: code {token!r} at level {level + 1}, where item "
                    f"{first[0]!r} has <{names[level]}_…>"
                )
            flat.append(int(match[2]))
        row_of[item] = len(row_of)
    if not row_of:
        raise UserError(f"{path}: holds no items")
    if len(set(names)) != len(names):
        raise UserError(
            f"{path}: item {first[0]!r}: two levels share a name in {first[1]}; "
            "expected a name of its own for each level"
        )
    codes = np.frombuffer(flat, np.int32).reshape(-1, len(names))
    sizes = [int(size) + 1 for size in codes.max(axis=0)]
    if item_ids is None:
        return IndexFile(codes, sizes, names, 0)
    rows = np.fromiter((row_of.get(item, -1) for item in item_ids), np.int64)
    if (rows < 0).any():
        missing = next(item for item in item_ids if item not in row_of)
        raise UserError(
            f"{path}: item {missing!r} of the interactions has no code "
            f"({int((rows < 0).sum())} such items); add it, or leave items.index out to build one"
        )
    return IndexFile(codes[rows], sizes, names, len(row_of) - len(rows))


def stored_ids(folder: str | Path, item_ids: Iterable[str]) -> Iterator[str]:
    """The items of the index.json beside a catalogue, one at a time.

    They are `item_ids`, in that order. Raises UserError where the file is not what the
    index stage wrote and, when it gets there, where its items are others.
    """
    path = verified(folder, INDEX, REPAIR)
    for entry, item in zip_longest(stream_json_object(path), item_ids):
        if entry is None or item is None or entry[0] != item:
            raise UserError(
                f"{folder}: the index was made for other items than the run's prepared data holds; "
                "run `ilrec index` again"
            )
        yield item


def write_index(path: str | Path, catalogue: Catalogue, item_ids: Sequence[str]) -> None:
    """Write the catalogue as an index.json, items in index order.

    One item is written at a time: the objects of a large catalogue would fill the
    memory.
    """
    names = {token: json.dumps(name) for token, name in catalogue.token_names().items()}
    with open(path, "w", encoding="utf-8") as file:
        file.write("{")
        for number, item in enumerate(item_ids):
            tokens = catalogue.tokens[catalogue.position[number]].tolist()
            code = ", ".join([names[token] for token in tokens if token != NO_TOKEN])
            file.write(f"{', ' if number else ''}{json.dumps(item, ensure_ascii=False)}: [{code}]")
        file.write("}")
