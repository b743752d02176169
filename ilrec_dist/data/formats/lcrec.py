"""The LC-Rec triple: NAME.inter.json (user → chronological items) and, where present, NAME.item.json (item → text fields)."""

from __future__ import annotations

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
from ilrec_dist.data.formats.source import Rejects, Source, item_rows

BATCH_USERS = 4096


def lcrec_files(config: DataConfig) -> list[Path]:
    """The inter file and, if there is one beside it, the item file. `data.path` is the folder or the inter file itself."""
    path = Path(config.path or "")
    inter = (
        single_file(path, [".inter.json"], "the interactions of an LC-Rec triple")
        if not path.is_file()
        else path
    )
    item = inter.with_name(inter.name.removesuffix(".inter.json") + ".item.json")
    return [require_file(inter, "data.path"), *([item] if item.exists() else [])]


def read_lcrec(config: DataConfig) -> Source:
    """Users and items keep their ids; a user's list is taken as chronological. The third file, NAME.index.json, is items.index."""
    inter, *item = lcrec_files(config)
    return Source(
        inter,
        timed=False,
        batches=lambda rejects: _batches(inter, rejects),
        item_table=lambda: _items(item[0]) if item else None,
    )


def _batches(path: Path, rejects: Rejects) -> Iterator[pa.RecordBatch]:
    """The users in turn, BATCH_USERS to a batch; what is in memory as Python objects is one batch."""
    histories: dict[str, list[Any]] = {}
    for number, (user, items) in enumerate(stream_json_object(path), 1):
        if not user:
            rejects.add(path, number, "no user id", _short(items), "user")
        elif not isinstance(items, list) or not all(
            type(item) is int or (type(item) is str and item) for item in items
        ):
            rejects.add(
                path,
                number,
                f"{user!r} has {_short(items)}, expected a list of item ids (integers or strings)",
                _short(items),
                "user",
            )
        else:
            histories[user] = items
        if len(histories) == BATCH_USERS:
            yield _batch(histories)
            histories = {}
    if histories:
        yield _batch(histories)


def _batch(histories: dict[str, list[Any]]) -> pa.RecordBatch:
    lengths = np.fromiter(map(len, histories.values()), np.int64, len(histories))
    users = pa.array(list(histories), pa.string()).take(
        pa.array(np.repeat(np.arange(len(histories)), lengths))
    )
    items = pa.array([str(item) for item in chain.from_iterable(histories.values())], pa.string())
    return pa.record_batch({"user": users, "item": items})


def _items(path: Path) -> pa.Table:
    ids: list[str] = []
    titles: list[str | None] = []
    texts: list[str | None] = []
    for item, fields in stream_json_object(path):
        if not isinstance(fields, dict):
            raise UserError(
                f"{path}: item {item!r}: expected an object of text fields, found {_short(fields)}"
            )
        ids.append(item)
        titles.append(text_of(fields.get("title")) or None)
        texts.append(
            " ".join(
                filter(None, (text_of(value) for name, value in fields.items() if name != "title"))
            )
            or None
        )
    return item_rows(ids, titles, texts)


def text_of(value: Any) -> str:
    """Any JSON value as one line of text: lists and objects by their leaves; half a surrogate pair, which is no text, as a question mark."""
    if value is None:
        return ""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(filter(None, map(text_of, value)))
    text = " ".join(str(value).split())
    return text if is_text(text) else text.encode("utf-8", "replace").decode()


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON's escapes can name half a surrogate pair."""
    try:
        value.encode()
        return True
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
