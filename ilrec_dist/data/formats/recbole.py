"""RecBole atomic files: NAME.inter and perhaps NAME.item, tab-separated, typed headers.

A header field is NAME:TYPE, such as user_id:token. RecBole's benchmark files
(NAME.train.inter and so on) are written for a chronological split, beside a NAME.inter
with all interactions, which is what is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file, single_file
from ilrec_dist.common.manifest import verified
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.data.reading.delimited import Dialect, header_names, read_columns, read_delimited
from ilrec_dist.data.reading.item_table import NOT_SKIPPED, first_rows, item_rows, text_of
from ilrec_dist.data.reading.source import Format, Rejects, Source
from ilrec_dist.data.reading.times import KINDS, Times

DIALECT = Dialect("\t", quoted=False)
TITLES = ("title", "movie_title", "item_name", "name")
# Benchmark files: one of the three that hold a split.
BENCHMARK = re.compile(r"(.+)\.(train|valid|test)\.inter")
# A column that may hold times where none is called timestamp.
TIME_LIKE = re.compile(r"time|date|(^|_)ts$", re.IGNORECASE)
DECIMAL_MARK = re.compile(rb"[.eE]")
# RecBole's MAX_ITEM_LIST_LENGTH: the items of a history that its sequential models take.
HISTORY_ITEMS = 50
# Targets that are written at once.
CHUNK_TARGETS = 50_000
CHUNK_ROWS = 1_000_000
# What pandas, which RecBole reads with, takes for a missing value: the default na_values of
# read_csv.
MISSING = [
    *("", "#N/A N/A", "#N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
]


def recbole_files(config: DataConfig) -> list[Path]:
    """The .inter file and, if there is one beside it, the .item file.

    `data.path` is the folder or the .inter file itself. Raises UserError for benchmark
    files, each of which holds a part of the interactions only.
    """
    path = Path(config.path or "")
    inter = path if path.is_file() else _inter_of_folder(path)
    if (part := BENCHMARK.fullmatch(inter.name)) and _benchmark_files(inter.parent, part[1]) > 1:
        raise _is_benchmark(inter, f"the files {part[1]}.train|valid|test.inter are")
    item = inter.with_suffix(".item")
    return [require_file(inter, "data.path"), *([item] if item.exists() else [])]


def read_recbole(config: DataConfig) -> Source:
    """Columns user_id, item_id and timestamp, or the one `:float` column that looks
    like a time.

    Without a time rows are in chronological order.
    """
    inter, *item = recbole_files(config)
    names = header_names(inter, DIALECT)
    _refuse_lists(inter, names)
    columns = {"user": _typed(inter, names, "user_id"), "item": _typed(inter, names, "item_id")}
    time, notes = _time_column(inter, names)
    times = None
    if time is not None:
        columns["time"] = time
        times = Times(_float_kind(inter, time) if time.endswith(":float") else None)

    def unit() -> str:
        if times is None or times.kind in (None, "integer"):
            return "as in the file"
        if times.kind == "decimal":
            return "thousandths of the numbers in the file"
        return "milliseconds since 1970"

    return Source(
        inter,
        timed=time is not None,
        batches=lambda rejects: read_delimited(inter, columns, {}, DIALECT, rejects, times),
        item_table=lambda: _items(item[0]) if item else None,
        item_file=item[0] if item else None,
        timestamp_unit=unit,
        notes=notes,
    )


def write_recbole(prepared: Path, dataset: InteractionDataset, out: Path, name: str) -> None:
    """Write NAME.inter and NAME.item.

    Of a chronological split also the benchmark files.

    NAME.inter has timestamps as stored, or the position in the sequence where there are
    none; leave-one-out over it (`eval_args: {split: {LS: valid_and_test}, order: TO}`)
    is the same split. Of a chronological split NAME.train.inter, NAME.valid.inter and
    NAME.test.inter carry the split (`benchmark_filename: [train, valid, test]`). Raises
    UserError for ids that a RecBole file cannot hold.
    """
    chronological = dataset.split_positions is not None
    users = _writable_ids(dataset.user_ids, "user")
    items = _writable_ids(dataset.item_ids, "item", within_lists=chronological)
    _write_interactions(prepared, dataset, out / f"{name}.inter", users, items)
    if chronological:
        _write_benchmark(dataset, out, name, users, items)
    blank = [""] * dataset.num_items
    titles, texts = (
        pa.array([_one_line(text) for text in column or blank], pa.large_string())
        for column in (dataset.titles, dataset.texts)
    )
    with open(out / f"{name}.item", "wb") as file:
        file.write(b"item_id:token\ttitle:token_seq\ttext:token_seq\n")
        _write_rows(file, items, titles, texts)


# Reading


def _inter_of_folder(folder: Path) -> Path:
    """The folder's one .inter file that is no benchmark file."""
    if not folder.exists():
        return single_file(folder, [".inter"], "RecBole interactions")
    inters = sorted(path for path in folder.iterdir() if path.name.endswith(".inter"))
    whole = [path for path in inters if not BENCHMARK.fullmatch(path.name)]
    if len(whole) == 1:
        return whole[0]
    if inters and not whole:
        raise _is_benchmark(folder, f"{', '.join(path.name for path in inters[:3])} are")
    return single_file(folder, [".inter"], "RecBole interactions")


def _benchmark_files(folder: Path, name: str) -> int:
    return sum((folder / f"{name}.{part}.inter").exists() for part in ("train", "valid", "test"))


def _is_benchmark(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what} RecBole benchmark files, each with a part of the interactions only; "
        f"expected one NAME.inter with all of them (user_id:token, item_id:token and "
        f"timestamp:float, one row an interaction)"
    )


def _refuse_lists(path: Path, names: list[str]) -> None:
    """Refuse a file of one row a target with its history.

    Each interaction is in many rows.
    """
    for name in names:
        field, _, kind = name.partition(":")
        if kind.endswith("_seq") and (field.endswith("_list") or field.startswith("item_id")):
            raise _is_benchmark(path, f"column {name} holds histories, as in")


def _time_column(path: Path, names: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """(the header field of the times or None, what to say about it)."""
    if time := _find(names, ["timestamp"]):
        return time, ()
    like = [name for name in names if TIME_LIKE.search(name.partition(":")[0])]
    floats = [name for name in like if name.endswith(":float")]
    if len(floats) > 1:
        raise UserError(
            f"{path}: {' and '.join(floats)} may both hold times; rename the one that orders the "
            f"interactions to timestamp:float"
        )
    if floats:
        return floats[0], (f"times are those of column {floats[0]}",)
    if like:
        return None, (
            f"no column timestamp:float: rows are taken in the order of the file, "
            f"and {', '.join(like)} is not read",
        )
    return None, ()


def _float_kind(path: Path, column: str) -> str:
    """How the times of a `:float` column are read.

    As integers if none of them is a decimal.

    RecBole types integer times as float too. The column is read once more, up to the
    first decimal number.
    """
    for batch, _ in read_columns(path, [column], {}, DIALECT, Rejects(sys.maxsize)):
        values = batch.column(column)
        data = values.buffers()[2]
        if data is None or not DECIMAL_MARK.search(data):
            continue
        text = pc.utf8_trim_whitespace(values)
        decimal = pc.match_substring_regex(text, KINDS["decimal"])
        integer = pc.match_substring_regex(text, KINDS["integer"])
        if pc.any(pc.and_not(decimal, integer)).as_py():
            return "decimal"
    return "integer"


def _find(names: list[str], wanted: Sequence[str]) -> str | None:
    """The header field whose name before the colon is the first of `wanted` that
    occurs.
    """
    by_name = {name.split(":")[0]: name for name in names}
    return next((by_name[name] for name in wanted if name in by_name), None)


def _typed(path: Path, names: list[str], wanted: str) -> str:
    name = _find(names, [wanted])
    if name is None:
        raise UserError(f"{path}: no column {wanted}:token; the header has: {', '.join(names)}")
    return name


def _items(path: Path) -> pa.Table:
    """Titles, and the other columns of type token and token_seq as one text."""
    names = header_names(path, DIALECT)
    key, title = _typed(path, names, "item_id"), _find(names, TITLES)
    kinds = {name: name.partition(":")[2] for name in names if name not in (key, title)}
    text = [name for name, kind in kinds.items() if kind in ("token", "token_seq")]
    wanted = [key, *([title] if title else []), *text]
    rejects = Rejects(hint=NOT_SKIPPED)
    batches = [batch for batch, _ in read_columns(path, wanted, {}, DIALECT, rejects)]
    schema = pa.schema([(name, pa.string()) for name in wanted])
    table = pa.Table.from_batches([batch.select(wanted) for batch in batches], schema)
    columns = {name: table.column(name).combine_chunks() for name in wanted}
    nothing = pa.nulls(table.num_rows, pa.string())
    # `text_of` leaves out what is missing. (Arrow's join that skips nulls loses whole rows.)
    rows = zip(*(columns[name].to_pylist() for name in text), strict=True)
    texts = [text_of(list(row)) for row in rows] if text else nothing
    return first_rows(item_rows(columns[key], columns[title] if title else nothing, texts))


# Writing


def _write_interactions(
    prepared: Path, dataset: InteractionDataset, path: Path, users: pa.Array, items: pa.Array
) -> None:
    stream = pq.ParquetFile(verified(prepared, "interactions.parquet"), pre_buffer=False)
    timed = "timestamp" in stream.schema_arrow.names
    done = 0
    with open(path, "wb") as file:
        file.write(b"user_id:token\titem_id:token\ttimestamp:float\n")
        for batch in stream.iter_batches(CHUNK_ROWS):
            user = batch.column("user")
            position = np.arange(done, done + batch.num_rows) - dataset.offsets[user.to_numpy()]
            time = batch.column("timestamp") if timed else pa.array(position)
            _write_rows(file, users.take(user), items.take(batch.column("item")), time)
            done += batch.num_rows


def _write_benchmark(
    dataset: InteractionDataset, out: Path, name: str, users: pa.Array, items: pa.Array
) -> None:
    everyone = np.arange(dataset.num_users)
    rows = dataset.train_lengths()
    user = np.repeat(everyone, rows)
    position = np.arange(len(user)) - np.repeat(np.cumsum(rows) - rows, rows)
    targets = {
        "train": (user, position),
        "valid": (everyone, dataset.target_positions("validation")),
        "test": (everyone, dataset.target_positions("test")),
    }
    for part, (user, position) in targets.items():
        path = out / f"{name}.{part}.inter"
        _write_histories(dataset, path, users, items, user, position)


def _write_histories(
    dataset: InteractionDataset,
    path: Path,
    users: pa.Array,
    items: pa.Array,
    user: np.ndarray,
    position: np.ndarray,
) -> None:
    """Write one row a target, given as user and position, with the items before it.

    Targets with nothing before them are left out. RecBole cuts neither split nor
    histories of such files itself.
    """
    user, position = user[position >= 1], position[position >= 1]
    with open(path, "wb") as file:
        file.write(b"user_id:token\titem_id_list:token_seq\titem_id:token\n")
        for start in range(0, len(user), CHUNK_TARGETS):
            chunk = slice(start, start + CHUNK_TARGETS)
            stop = dataset.offsets[user[chunk]] + position[chunk]
            length = np.minimum(position[chunk], HISTORY_ITEMS)
            bounds = np.concatenate([[0], np.cumsum(length)])
            before = dataset.items[np.repeat(stop - bounds[1:], length) + np.arange(bounds[-1])]
            lists = pa.LargeListArray.from_arrays(pa.array(bounds), items.take(pa.array(before)))
            histories = pc.binary_join(lists, pa.scalar(" ", pa.large_string()))
            targets = items.take(pa.array(dataset.items[stop]))
            _write_rows(file, users.take(pa.array(user[chunk])), histories, targets)


def _writable_ids(ids: Sequence[str], what: str, within_lists: bool = False) -> pa.Array:
    """The ids as an array. Raises UserError for one that would not read back.

    within_lists: ids stand in lists too, which spaces separate.
    """
    column = pa.array(list(ids), pa.large_string())
    pattern = r'[\t\r\n ]|^"' if within_lists else r'[\t\r\n]|^"'
    unfit = column.filter(pc.match_substring_regex(column, pattern))
    if len(unfit):
        inner = "a space, a tab or a line break" if within_lists else "a tab or a line break"
        raise UserError(
            f"{what} {unfit[0].as_py()!r}: RecBole's files cannot hold ids with {inner} in them "
            f"or a quote mark at the beginning"
        )
    lost = column.filter(pc.is_in(column, pa.array(MISSING, pa.large_string())))
    if len(lost):
        raise UserError(
            f"{what} {lost[0].as_py()!r}: pandas, which RecBole reads with, takes this id for a "
            f"missing value; rename it in the input and prepare again"
        )
    return column


def _one_line(text: str) -> str:
    """The text with spaces for tabs and line breaks.

    Where it begins with a quote mark, it gets single ones: pandas, which RecBole reads
    with, would look for the closing one.
    """
    text = re.sub(r"[\t\r\n]", " ", text)
    return text.replace('"', "'") if text.startswith('"') else text


def _write_rows(file: BinaryIO, *columns: pa.Array) -> None:
    """Write rows tab-separated and bare.

    Pyarrow's writer refuses quote marks it may not double.
    """
    bare = [column.cast(pa.large_string()) for column in columns]
    lines = pc.binary_join_element_wise(*bare, pa.scalar("\t", pa.large_string()))
    empty, line_break = (pa.scalar(text, pa.large_string()) for text in ("", "\n"))
    text = pc.binary_join_element_wise(lines, empty, line_break)
    file.write(b"" if len(text) == 0 else text.buffers()[2])


FORMAT = Format(read_recbole, recbole_files, write_recbole)
