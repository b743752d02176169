"""Raw Amazon reviews, one JSON object a line, plain or .gz, with their metadata.

The 2018 edition's fields are those of 2014 too, whose metadata are Python dicts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.reading.columns import checked_batch
from ilrec_dist.data.reading.item_table import first_rows, is_text, item_rows, title_and_text
from ilrec_dist.data.reading.lines import filled_lines, line_blocks
from ilrec_dist.data.reading.python_literal import parse_literal
from ilrec_dist.data.reading.source import Format, Rejects, Source
from ilrec_dist.data.reading.streams import open_text
from ilrec_dist.data.reading.table_files import item_files
from ilrec_dist.data.reading.times import Times, failing_rows

# Edition → the fields of user, item and time. 2023 gives an item's variants one parent_asin, by
# which its metadata go.
FIELDS = {
    "2018": ("reviewerID", "asin", "unixReviewTime"),
    "2023": ("user_id", "parent_asin", "timestamp"),
}
UNITS = {"2018": "seconds since 1970", "2023": "milliseconds since 1970"}
TEXT_FIELDS = [
    "brand",
    "store",
    "category",
    "categories",
    "main_category",
    "features",
    "feature",
    "description",
]
PYTHON_REVIEW = (
    "a Python dict, not JSON; write each review as JSON, such as with "
    "json.dumps(ast.literal_eval(line))"
)


def amazon_files(config: DataConfig) -> list[Path]:
    """The reviews (`data.path`) and the metadata (`data.items_path`)."""
    return [require_file(config.path or "", "data.path"), *item_files(config)]


def read_amazon(config: DataConfig) -> Source:
    """The edition shows in a review's fields.

    Every review is an interaction, whatever its rating.
    """
    reviews, *metadata = amazon_files(config)
    edition = _edition(reviews, config.max_bad_rows)
    return Source(
        reviews,
        timed=True,
        batches=lambda rejects: _batches(reviews, FIELDS[edition], rejects),
        item_table=lambda: _items(metadata[0], FIELDS[edition][1]) if metadata else None,
        item_file=metadata[0] if metadata else None,
        timestamp_unit=lambda: UNITS[edition],
    )


def _edition(path: Path, max_bad_rows: int) -> str:
    """By the first review, or by the first good one where bad rows are tolerated."""
    complaint = ""
    with open_text(path, "utf-8-sig") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(filled, max_bad_rows + 1):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = _malformed(line, error)
                if reason != PYTHON_REVIEW:
                    reason += "; expected one review a line"
                complaint = complaint or f"line {number}: {reason}"
                continue
            for edition, names in FIELDS.items():
                if isinstance(fields, dict) and set(names) <= set(fields):
                    return edition
            expected = " or ".join(
                f"{', '.join(names)} ({edition})" for edition, names in FIELDS.items()
            )
            complaint = complaint or f"line {number}: expected a review with the fields {expected}"
    raise UserError(f"{path}: {complaint or 'the file is empty, expected one review a line'}")


def _malformed(line: str, error: Exception) -> str:
    """Why a line is not JSON."""
    if line.lstrip().startswith("{'"):
        return PYTHON_REVIEW
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON at column {error.colno}: {error.msg}"
    return f"malformed JSON: {error}"


def _batches(path: Path, names: tuple[str, str, str], rejects: Rejects) -> Iterator[pa.RecordBatch]:
    times = Times()
    schema = pa.schema([(names[0], pa.string()), (names[1], pa.string()), (names[2], pa.int64())])
    for block, first_line in line_blocks(path):
        table, lines = parse_block(path, block, first_line, schema, rejects)
        for batch in table.combine_chunks().to_batches():

            def numbers(rows: np.ndarray, lines: np.ndarray = lines) -> list[int]:
                at: list[int] = lines[rows].tolist()
                return at

            columns = dict(zip(("user", "item", "time"), batch.columns, strict=True))
            yield checked_batch(path, columns, times, rejects, numbers)


def parse_block(
    path: Path, block: bytes, first_line: int, schema: pa.Schema, rejects: Rejects
) -> tuple[pa.Table, np.ndarray]:
    """(table of the schema's fields, line number of each row).

    Malformed lines go to `rejects`; only blocks that have some are looked at line by
    line.
    """
    starts, numbers = filled_lines(block)
    numbers += first_line
    if len(numbers) == 0:
        return schema.empty_table(), numbers
    stops = np.append(starts[1:], len(block))

    def works(first: int, last: int) -> bool:
        try:
            rows: int = _parse(block[starts[first] : stops[last - 1]], schema).num_rows
            return rows == last - first
        except pa.ArrowInvalid:
            return False

    try:
        table = _parse(block, schema)
        if table.num_rows == len(numbers):
            return table, numbers
    except pa.ArrowInvalid:
        pass
    bad: list[int] = []
    for row in failing_rows(len(numbers), works):
        line = block[starts[row] : stops[row]].partition(b"\n")[0]
        text = line.decode("utf-8", "replace")
        rejects.add(path, int(numbers[row]), _complaint(line, schema), text)
        bad.append(row)
    kept = np.delete(np.arange(len(numbers)), bad)
    good = b"".join(block[starts[row] : stops[row]] for row in kept.tolist())
    return _parse(good, schema) if good else schema.empty_table(), numbers[kept]


def _parse(data: bytes, schema: pa.Schema) -> pa.Table:
    return pajson.read_json(
        pa.BufferReader(data),
        pajson.ReadOptions(use_threads=False, block_size=len(data) + 1),
        pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _complaint(line: bytes, schema: pa.Schema) -> str:
    """Why a line that pyarrow refuses is no row of the schema."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _malformed(text, error)
    if not isinstance(value, dict):
        return f"expected a JSON object, found {type(value).__name__}"
    keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
    for field in schema:
        present = value.get(field.name)
        is_integer = pa.types.is_integer(field.type)
        if keys.count(field.name) > 1:
            return f"field {field.name!r} is given twice"
        if present is not None and type(present) is not (int if is_integer else str):
            expected = "an integer" if is_integer else "a string"
            return f"field {field.name!r} is {present!r}, expected {expected}"
        if isinstance(present, int) and not -(2**63) <= present < 2**63:
            return f"field {field.name!r} is {present}, expected an integer of 64 bits"
    if not is_text(json.dumps(value, ensure_ascii=False)):
        return r"an escape such as \ud83d without the other half of its pair: not text"
    return "not JSON as pyarrow reads it"


def _items(path: Path, key: str) -> pa.Table:
    """Titles and texts of the metadata; a product listed twice counts once."""
    ids: list[str] = []
    titles: list[str] = []
    texts: list[str] = []
    for block, first_line in line_blocks(path):
        for number, line in enumerate(block.split(b"\n"), first_line):
            if not line.strip():
                continue
            try:
                fields = _product(line)
                item = fields[key]
                if type(item) not in (str, int) or not is_text(str(item)) or not str(item).strip():
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{path}: line {number}: expected a JSON object with the field {key!r}"
                ) from None
            title, text = title_and_text(fields, TEXT_FIELDS)
            ids.append(str(item))
            titles.append(title)
            texts.append(text)
    return first_rows(item_rows(ids, titles, texts))


def _product(line: bytes) -> Any:
    """A line of metadata: JSON, or a Python dict as in 2014.

    Raises ValueError for others.
    """
    try:
        return json.loads(line)
    except ValueError:
        return parse_literal(line.decode("utf-8"))


FORMAT = Format(read_amazon, amazon_files, settings=frozenset({"path", "items_path"}))
