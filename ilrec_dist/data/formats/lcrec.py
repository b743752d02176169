"""The LC-Rec triple.

NAME.inter.json (user → ordered items), NAME.item.json (item → texts).

The third file, NAME.index.json, is `items.index`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file, single_file
from ilrec_dist.common.json_stream import stream_json_object
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.reading.columns import strip_blanks
from ilrec_dist.data.reading.item_table import item_rows, title_and_text
from ilrec_dist.data.reading.source import Format, Rejects, Source

BATCH_USERS = 4096
# Ids that are written as JSON integers: those that every reader holds in 64 bits.
INTEGER_ID = re.compile("0|[1-9][0-9]{0,18}")
LARGEST_INTEGER = 2**63 - 1
# Characters of a value that an error shows.
SHOWN_CHARACTERS = 60


def lcrec_files(config: DataConfig) -> list[Path]:
    """The inter file and, if there is one beside it, the item file.

    `data.path` is the folder or the inter file itself.
    """
    path = Path(config.path or "")
    inter = path
    if not path.is_file():
        inter = single_file(path, [".inter.json"], "the interactions of an LC-Rec triple")
    item = inter.with_name(inter.name.removesuffix(".inter.json") + ".item.json")
    return [require_file(inter, "data.path"), *([item] if item.exists() else [])]


def read_lcrec(config: DataConfig) -> Source:
    """Users and items keep their ids; a user's list is taken as chronological."""
    inter, *item = lcrec_files(config)
    return Source(
        inter,
        timed=False,
        batches=lambda rejects: _batches(inter, rejects),
        item_table=lambda: _items(item[0]) if item else None,
        item_file=item[0] if item else None,
    )


def write_lcrec(prepared: Path, dataset: InteractionDataset, out: Path, name: str) -> None:
    """Write NAME.inter.json and NAME.item.json.

    Ids are kept: as integers where they are plain ones of 64 bits, else as strings.
    Raises UserError for a chronological split, which the files cannot carry.
    """
    if dataset.split_positions is not None:
        raise UserError(
            f"{prepared}: split chronologically, but files of lcrec are split by leave-one-out; "
            f"prepare with data.split=leave_one_out to export"
        )
    item_ids = np.array([_json_id(item) for item in dataset.item_ids], object)
    # The file is written a user at a time, because the whole need not fit in memory as objects.
    with open(out / f"{name}.inter.json", "w", encoding="utf-8") as file:
        for user, user_id in enumerate(dataset.user_ids):
            history = json.dumps(item_ids[dataset.sequence(user)].tolist())
            file.write(("{" if user == 0 else ",\n") + f"{json.dumps(user_id)}: {history}")
        file.write("}\n")
    blank = [""] * dataset.num_items
    rows = zip(dataset.item_ids, dataset.titles or blank, dataset.texts or blank, strict=True)
    items = {item: {"title": title, "description": text} for item, title, text in rows}
    (out / f"{name}.item.json").write_text(
        json.dumps(items, indent=0, ensure_ascii=False), encoding="utf-8"
    )


def _json_id(item: str) -> int | str:
    if INTEGER_ID.fullmatch(item) and int(item) <= LARGEST_INTEGER:
        return int(item)
    return item


def _batches(path: Path, rejects: Rejects) -> Iterator[pa.RecordBatch]:
    """The users in turn, BATCH_USERS to a batch.

    So many are in memory as Python objects.
    """
    histories: dict[str, list[Any]] = {}
    for number, (user, items) in enumerate(stream_json_object(path, strip_keys=True), 1):
        if not user:
            rejects.add(path, number, "no user id", _short(items), "user")
        elif not isinstance(items, list) or not all(map(_is_id, items)):
            expected = "a list of item ids (integers or strings)"
            reason = f"{user!r} has {_short(items)}, expected {expected}"
            rejects.add(path, number, reason, _short(items), "user")
        elif not items:
            rejects.users_without_interactions += 1
        else:
            histories[user] = items
        if len(histories) == BATCH_USERS:
            yield _batch(histories)
            histories = {}
    if histories:
        yield _batch(histories)


def _is_id(item: Any) -> bool:
    return type(item) is int or (type(item) is str and item != "" and not item.isspace())


def _batch(histories: dict[str, list[Any]]) -> pa.RecordBatch:
    lengths = np.fromiter(map(len, histories.values()), np.int64, len(histories))
    user_of_row = pa.array(np.repeat(np.arange(len(histories)), lengths))
    users = pa.array(list(histories), pa.string()).take(user_of_row)
    items = pa.array([str(item) for item in chain.from_iterable(histories.values())], pa.string())
    return pa.record_batch({"user": users, "item": strip_blanks(items)})


def _items(path: Path) -> pa.Table:
    ids: list[str] = []
    titles: list[str] = []
    texts: list[str] = []
    for item, fields in stream_json_object(path, strip_keys=True):
        if not isinstance(fields, dict):
            raise UserError(
                f"{path}: item {item!r}: expected an object of text fields, found {_short(fields)}"
            )
        title, text = title_and_text(fields)
        ids.append(item)
        titles.append(title)
        texts.append(text)
    return item_rows(ids, titles, texts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


FORMAT = Format(read_lcrec, lcrec_files, write_lcrec)
