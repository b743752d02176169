"""Raw Amazon reviews, one JSON object a line, 2018 and 2023 editions, plain or .gz, with their metadata."""

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
from ilrec_dist.data.formats.columns import Times, checked_batch, failing_rows
from ilrec_dist.data.formats.delimited import open_text
from ilrec_dist.data.formats.lcrec import is_text, text_of
from ilrec_dist.data.formats.lines import filled_lines, line_blocks
from ilrec_dist.data.formats.recbole import first_rows
from ilrec_dist.data.formats.source import Rejects, Source, item_rows

# Edition → (user, item, time) and what else; 2023 gives an item's variants one parent_asin, by which its metadata go.
FIELDS = {
    "2018": ("reviewerID", "asin", "unixReviewTime"),
    "2023": ("user_id", "parent_asin", "timestamp"),
}
UNITS = {"2018": "seconds since 1970", "2023": "milliseconds since 1970"}
TEXT_FIELDS = (
    "brand",
    "store",
    "category",
    "categories",
    "main_category",
    "features",
    "feature",
    "description",
)


def amazon_files(config: DataConfig) -> list[Path]:
    """The reviews (`data.path`) and the metadata (`data.items_path`)."""
    files = [require_file(config.path or "", "data.path")]
    return files + (
        [require_file(config.items_path, "data.items_path")] if config.items_path else []
    )


def read_amazon(config: DataConfig) -> Source:
    """The edition shows in a review's fields. Every review is an interaction, whatever its rating."""
    reviews, *metadata = amazon_files(config)
    edition = _edition(reviews, config.max_bad_rows)
    return Source(
        reviews,
        timed=True,
        batches=lambda rejects: _batches(reviews, FIELDS[edition], rejects),
        item_table=lambda: _items(metadata[0], FIELDS[edition][1]) if metadata else None,
        timestamp_unit=UNITS[edition],
    )


def _edition(path: Path, max_bad_rows: int) -> str:
    """By the first review, or by the first good one where bad rows are tolerated."""
    complaint = ""
    with open_text(path, "utf-8-sig") as file:
        for number, line in islice(
            ((number, line) for number, line in enumerate(file, 1) if line.strip()),
            max_bad_rows + 1,
        ):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                where = (
                    f" at column {error.colno}: {error.msg}"
                    if isinstance(error, json.JSONDecodeError)
                    else f": {error}"
                )
                complaint = (
                    complaint or f"line {number}: malformed JSON{where}; expected one review a line"
                )
                continue
            for edition, names in FIELDS.items():
                if isinstance(fields, dict) and set(names) <= set(fields):
                    return edition
            expected = " or ".join(
                f"{', '.join(names)} ({edition})" for edition, names in FIELDS.items()
            )
            complaint = complaint or f"line {number}: expected a review with the fields {expected}"
    raise UserError(f"{path}: {complaint or 'the file is empty, expected one review a line'}")


def _batches(path: Path, names: tuple[str, str, str], rejects: Rejects) -> Iterator[pa.RecordBatch]:
    times = Times()
    schema = pa.schema([(names[0], pa.string()), (names[1], pa.string()), (names[2], pa.int64())])
    for block, first_line in line_blocks(path):
        table, lines = parse_block(path, block, first_line, schema, rejects)
        for batch in table.combine_chunks().to_batches():

            def places(rows: np.ndarray, lines: np.ndarray = lines) -> list[int]:
                return lines[rows].tolist()

            yield checked_batch(
                path,
                dict(zip(("user", "item", "time"), batch.columns, strict=True)),
                times,
                rejects,
                places,
            )


def parse_block(
    path: Path, block: bytes, first_line: int, schema: pa.Schema, rejects: Rejects
) -> tuple[pa.Table, np.ndarray]:
    """(table of the schema's fields, line number of each row). Malformed lines go to `rejects`; only blocks that have some are looked at line by line."""
    starts, numbers = filled_lines(block)
    numbers += first_line
    if len(numbers) == 0:
        return schema.empty_table(), numbers
    stops = np.append(starts[1:], len(block))

    def works(first: int, last: int) -> bool:
        try:
            return _parse(block[starts[first] : stops[last - 1]], schema).num_rows == last - first
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
        rejects.add(
            path, int(numbers[row]), _complaint(line, schema), line.decode("utf-8", "replace")
        )
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
        value = json.loads(text)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"malformed JSON at column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return f"malformed JSON: {error}"
    if not isinstance(value, dict):
        return f"expected a JSON object, found {type(value).__name__}"
    keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
    for field in schema:
        found = value.get(field.name)
        expected = int if pa.types.is_integer(field.type) else str
        if keys.count(field.name) > 1:
            return f"field {field.name!r} is given twice"
        if found is not None and type(found) is not expected:
            return f"field {field.name!r} is {found!r}, expected {'an integer' if expected is int else 'a string'}"
        if isinstance(found, int) and not -(2**63) <= found < 2**63:
            return f"field {field.name!r} is {found}, expected an integer of 64 bits"
    if not is_text(json.dumps(value, ensure_ascii=False)):
        return r"an escape such as \ud83d without the other half of its pair: not text"
    return "not JSON as pyarrow reads it"


def _items(path: Path, key: str) -> pa.Table:
    """Titles and texts of the metadata; a product listed twice counts once."""
    ids: list[str] = []
    titles: list[str | None] = []
    texts: list[str | None] = []
    for block, first_line in line_blocks(path):
        for number, line in enumerate(block.split(b"\n"), first_line):
            if not line.strip():
                continue
            try:
                fields: dict[str, Any] = json.loads(line)
                item = fields[key]
                if type(item) not in (str, int) or not is_text(str(item)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{path}: line {number}: expected a JSON object with the field {key!r}"
                ) from None
            ids.append(str(item))
            titles.append(text_of(fields.get("title")) or None)
            texts.append(
                " ".join(filter(None, (text_of(fields.get(name)) for name in TEXT_FIELDS))) or None
            )
    return first_rows(item_rows(ids, titles, texts))
