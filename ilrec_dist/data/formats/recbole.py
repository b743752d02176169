"""RecBole atomic files: NAME.inter and, where present, NAME.item, tab-separated with typed headers such as user_id:token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file, single_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats.delimited import Dialect, header_names, read_columns, read_delimited
from ilrec_dist.data.formats.source import Rejects, Source

DIALECT = Dialect("\t", quoted=False)
TITLES = ("title", "movie_title", "item_name", "name")


def recbole_files(config: DataConfig) -> list[Path]:
    """The .inter file and, if there is one beside it, the .item file. `data.path` is the folder or the .inter file itself."""
    path = Path(config.path or "")
    inter = path if path.is_file() else single_file(path, [".inter"], "RecBole interactions")
    item = inter.with_suffix(".item")
    return [require_file(inter, "data.path"), *([item] if item.exists() else [])]


def read_recbole(config: DataConfig) -> Source:
    """Columns user_id, item_id and, where present, timestamp; without it rows are in order."""
    inter, *item = recbole_files(config)
    names = header_names(inter, DIALECT)
    columns = {"user": _typed(inter, names, ["user_id"]), "item": _typed(inter, names, ["item_id"])}
    time = _find(names, ["timestamp"])
    kind = (
        "decimal" if time and time.endswith(":float") else None
    )  # whatever the first value looks like
    return Source(
        inter,
        timed=time is not None,
        batches=lambda rejects: read_delimited(
            inter, columns | ({"time": time} if time else {}), {}, DIALECT, rejects, kind
        ),
        item_table=lambda: _items(item[0]) if item else None,
        timestamp_unit="as in the file; thousandths for decimal numbers",
    )


def _find(names: list[str], wanted: list[str] | tuple[str, ...]) -> str | None:
    """The header field whose name before the colon is the first of `wanted` that occurs."""
    by_name = {name.split(":")[0]: name for name in names}
    return next((by_name[name] for name in wanted if name in by_name), None)


def _typed(path: Path, names: list[str], wanted: list[str]) -> str:
    found = _find(names, wanted)
    if found is None:
        raise UserError(f"{path}: no column {wanted[0]}:token; the header has: {', '.join(names)}")
    return found


def _items(path: Path) -> pa.Table:
    names = header_names(path, DIALECT)
    key, title = _typed(path, names, ["item_id"]), _find(names, TITLES)
    text = [
        name
        for name in names
        if name.partition(":")[2] in ("token", "token_seq") and name not in (key, title)
    ]
    wanted = [key, *([title] if title else []), *text]
    batches = [
        batch
        for batch, _ in read_columns(
            path, wanted, {}, DIALECT, Rejects(hint="mend it: items are not skipped")
        )
    ]
    table = (
        pa.Table.from_batches(batches)
        if batches
        else pa.table({name: pa.array([], pa.string()) for name in wanted})
    )
    columns = {name: table.column(name).combine_chunks() for name in wanted}
    nothing = pa.nulls(table.num_rows, pa.string())
    joined = (
        pc.utf8_trim_whitespace(
            pc.binary_join_element_wise(*(pc.fill_null(columns[name], "") for name in text), " ")
        )
        if text
        else nothing
    )
    joined = pc.if_else(
        pc.equal(joined, ""),
        pa.scalar(None, pa.string()),
        pc.replace_substring_regex(joined, "  +", " "),
    )
    return first_rows(
        pa.table(
            {"id": columns[key], "title": columns[title] if title else nothing, "text": joined}
        )
    )


def first_rows(table: pa.Table) -> pa.Table:
    """The first row of every id, in file order: published item files repeat some."""
    codes = (
        table.column("id")
        .combine_chunks()
        .dictionary_encode()
        .indices.to_numpy(zero_copy_only=False)
    )
    return table.take(pa.array(np.sort(np.unique(codes, return_index=True)[1])))
