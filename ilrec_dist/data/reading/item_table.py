"""Items' titles and texts.

The table of `data.items_path`, and what all item files share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns, require_file
from ilrec_dist.data.reading.columns import plain, strip_blanks, text_or_null
from ilrec_dist.data.reading.delimited import Dialect, header_names, read_columns
from ilrec_dist.data.reading.parquet_file import open_parquet, parquet_batches
from ilrec_dist.data.reading.source import Rejects

# Not a number, as pandas, JSON and Python write it: a field that is missing.
NAN = ("nan", "NaN")
NOT_SKIPPED = "mend it: items are not skipped"


def item_rows(
    ids: pa.Array | list[str], titles: pa.Array | list[str], texts: pa.Array | list[str]
) -> pa.Table:
    """The item table (id, title, text).

    Ids without blanks around them, texts as written.

    A title or text that is blank, or not a number, is null.
    """
    columns = [
        column.cast(pa.string()) if isinstance(column, pa.Array) else pa.array(column, pa.string())
        for column in (ids, titles, texts)
    ]
    cleaned = [strip_blanks(columns[0]), _or_missing(columns[1]), _or_missing(columns[2])]
    return pa.table(cleaned, ["id", "title", "text"])


def first_rows(table: pa.Table) -> pa.Table:
    """The first row of every id, in file order: published item files repeat some."""
    encoded = table.column("id").combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return table.take(pa.array(np.sort(np.unique(codes, return_index=True)[1])))


def title_and_text(fields: Mapping[str, Any], names: list[str] | None = None) -> tuple[str, str]:
    """The `title` of a JSON object, and its other fields (or those of `names`) as one
    text.
    """
    text_names = names if names is not None else [name for name in fields if name != "title"]
    return text_of(fields.get("title")), text_of([fields.get(name) for name in text_names])


def text_of(value: Any) -> str:
    """A JSON value as text, its spaces kept; lists and objects by their leaves.

    What is missing (null, not a number) is "". Half a surrogate pair, which is no text,
    becomes a question mark.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        parts = (text_of(part) for part in value)
        return " ".join(part for part in parts if part and not part.isspace())
    text = str(value)
    if text in NAN:
        return ""
    return text if is_text(text) else text.encode("utf-8", "replace").decode()


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8.

    JSON's escapes can name half a surrogate pair.
    """
    try:
        value.encode()
        return True
    except UnicodeEncodeError:
        return False


def read_item_table(path: str | Path) -> pa.Table:
    """`data.items_path` as (id, title, text).

    CSV or Parquet with item, title and perhaps text.

    Ids stay as they are written (007 is not 7) but for blanks around them. Raises
    UserError naming the file and the line, row or item.
    """
    path = require_file(path, "data.items_path")
    table = _parquet_items(path) if path.name.endswith(".parquet") else _csv_items(path)
    counts = pc.value_counts(table.column("id"))
    repeated = pc.filter(counts, pc.greater(counts.field("counts"), 1))
    if len(repeated):
        item, rows = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise UserError(f"{path}: item {item!r} has {rows} rows, expected one")
    return table


def dialect_of(path: Path) -> Dialect:
    """Tab-separated where the name says .tsv, else comma-separated."""
    return Dialect("\t" if path.name.removesuffix(".gz").endswith(".tsv") else ",")


def _or_missing(column: pa.Array) -> pa.Array:
    missing = pc.is_in(pc.utf8_trim_whitespace(column), pa.array(["", *NAN]))
    return pc.if_else(missing, pa.scalar(None, pa.string()), column)


def _item_columns(path: Path, present: list[str]) -> list[str]:
    names = ["item", "title", *(["text"] if "text" in present else [])]
    require_columns(path, dict.fromkeys(names, "data.items_path"), present)
    return names


def _csv_items(path: Path) -> pa.Table:
    dialect = dialect_of(path)
    names = _item_columns(path, header_names(path, dialect))
    rejects = Rejects(hint=NOT_SKIPPED)
    keys = dict.fromkeys(names, "data.items_path")
    batches = []
    for batch, lines in read_columns(path, names, keys, dialect, rejects):
        missing = np.flatnonzero(_without_id(batch.column("item")))
        for line in lines.at(missing[:1]) if len(missing) else ():
            rejects.add(path, line, "no item id")
        batches.append(batch)
    return _table(batches, names)


def _parquet_items(path: Path) -> pa.Table:
    file = open_parquet(path)
    names = _item_columns(path, file.schema_arrow.names)
    batches, first = [], 1
    for batch in parquet_batches(path, file, names):
        columns = {name: _text(path, name, batch.column(name), first) for name in names}
        missing = np.flatnonzero(_without_id(columns["item"]))
        if len(missing):
            raise UserError(f"{path}: row {first + missing[0]}: no item id; {NOT_SKIPPED}")
        batches.append(pa.record_batch(columns))
        first += batch.num_rows
    return _table(batches, names)


def _table(batches: list[pa.RecordBatch], names: list[str]) -> pa.Table:
    table = pa.Table.from_batches(batches, pa.schema([(name, pa.string()) for name in names]))
    nothing = pa.nulls(table.num_rows, pa.string())
    columns = [
        table.column(name).combine_chunks() if name in names else nothing
        for name in ("item", "title", "text")
    ]
    return item_rows(*columns)


def _text(path: Path, name: str, column: pa.Array, first: int) -> pa.Array:
    """The column as strings.

    Raises UserError naming row `first` + i where one is no text.
    """
    try:
        column = plain(column)
        if name == "item" and not (
            pa.types.is_integer(column.type)
            or pa.types.is_string(column.type)
            or pa.types.is_large_string(column.type)
        ):
            raise UserError(
                f"{path}: column 'item' holds {column.type}, expected strings or integers"
            )
        text = text_or_null(column).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{path}: column {name!r} holds {column.type}, expected text") from None
    lost = pc.and_(pc.is_valid(column), pc.is_null(text))
    bad = np.flatnonzero(lost.to_numpy(zero_copy_only=False))
    if len(bad):
        raise UserError(f"{path}: row {first + bad[0]}: {name!r} is not UTF-8 text; {NOT_SKIPPED}")
    return text


def _without_id(ids: pa.Array) -> np.ndarray:
    """bool: ids that are null or blank."""
    blank = pc.equal(strip_blanks(pc.fill_null(ids, "")), "")
    return np.asarray(blank.to_numpy(zero_copy_only=False))
