"""NAME.index.json: item id → code tokens such as ["<a_128>", "<b_241>"]; read into codes and written back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilrec_dist.data.files import read_json_object
from ilrec_dist.errors import UserError
from ilrec_dist.items.catalogue import PAD, Catalogue

TOKEN = re.compile(r"<([A-Za-z]+)_([0-9]{1,7})>")


def read_index(path: str | Path, item_ids: Sequence[str]) -> tuple[np.ndarray, list[int], list[str]]:
    """Codes int32 [num_items, C] of the items in index order, codes per level (the largest that occurs plus one), and the levels' names.

    Items of the file that the data set does not have are passed over, but count towards the level sizes. Raises UserError naming file and item for an
    item without a code, a token that is not of the form <a_128>, or a code of another length.
    """
    path = Path(path)
    index = read_json_object(path)
    if not index:
        raise UserError(f"{path}: holds no items")
    first_item, first = next(iter(index.items()))
    names: list[str] = []
    codes = np.empty((len(index), len(first) if isinstance(first, list) else 0), np.int32)
    for row, (item, tokens) in enumerate(index.items()):
        if not isinstance(tokens, list) or not tokens:
            raise UserError(f"{path}: item {item!r}: expected a list of code tokens, found {tokens!r}")
        if len(tokens) != codes.shape[1]:
            raise UserError(f"{path}: item {item!r} has {len(tokens)} codes, item {first_item!r} has {codes.shape[1]}; all items need as many")
        for level, token in enumerate(tokens):
            match = TOKEN.fullmatch(token) if isinstance(token, str) else None
            if match is None:
                raise UserError(f"{path}: item {item!r}: code {token!r} is not of the form <a_128>")
            if row == 0:
                names.append(match[1])
            elif match[1] != names[level]:
                raise UserError(f"{path}: item {item!r}: code {token!r} at level {level + 1}, where item {first_item!r} has <{names[level]}_…>")
            codes[row, level] = int(match[2])
    if len(set(names)) != len(names):
        raise UserError(f"{path}: item {first_item!r}: two levels share a name in {first}; expected a name of its own for each level")
    row_of = {item: row for row, item in enumerate(index)}
    rows = np.fromiter((row_of.get(item, -1) for item in item_ids), np.int64, len(item_ids))
    if (rows < 0).any():
        missing = item_ids[int(np.flatnonzero(rows < 0)[0])]
        count = int((rows < 0).sum())
        raise UserError(f"{path}: item {missing!r} of the interactions has no code ({count} such items); add it, or leave items.index out to build one")
    return codes[rows], [int(size) + 1 for size in codes.max(axis=0)], names


def write_index(path: str | Path, catalogue: Catalogue, item_ids: Sequence[str]) -> None:
    """The catalogue as an index.json, items in index order; an item at a time, as a large catalogue's objects would fill the memory."""
    names = [json.dumps(name) for name in catalogue.token_names()]
    with open(path, "w", encoding="utf-8") as file:
        file.write("{")
        for number, item in enumerate(item_ids):
            code = ", ".join([names[token] for token in catalogue.tokens[catalogue.position[number]] if token != PAD])
            file.write(f"{', ' if number else ''}{json.dumps(item, ensure_ascii=False)}: [{code}]")
        file.write("}")
