"""Raw Amazon reviews, one JSON object a line, 2018 and 2023 editions, plain or .gz, with their metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from ilrec_dist.config import DataConfig
from ilrec_dist.data.files import require_file
from ilrec_dist.data.readers.columns import Times, checked_batch
from ilrec_dist.data.readers.delimited import open_text
from ilrec_dist.data.readers.lcrec import text_of
from ilrec_dist.data.readers.recbole import first_rows
from ilrec_dist.data.readers.source import Rejects, Source, item_rows
from ilrec_dist.errors import UserError

BLOCK_BYTES = 16 << 20
# Edition → (user, item, time) and what else; 2023 gives an item's variants one parent_asin, by which its metadata go.
FIELDS = {"2018": ("reviewerID", "asin", "unixReviewTime"), "2023": ("user_id", "parent_asin", "timestamp")}
UNITS = {"2018": "seconds since 1970", "2023": "milliseconds since 1970"}
TEXT_FIELDS = ("brand", "store", "category", "categories", "main_category", "features", "feature", "description")


def amazon_files(config: DataConfig) -> list[Path]:
    """The reviews (`data.path`) and the metadata (`data.items_path`)."""
    files = [require_file(config.path or "", "data.path")]
    return files + ([require_file(config.items_path, "data.items_path")] if config.items_path else [])


def read_amazon(config: DataConfig) -> Source:
    """The edition shows in the first review's fields. Every review is an interaction, whatever its rating."""
    reviews, *metadata = amazon_files(config)
    edition = _edition(reviews)
    return Source(
        reviews,
        timed=True,
        batches=lambda rejects: _batches(reviews, FIELDS[edition], rejects),
        item_table=lambda: _items(metadata[0], FIELDS[edition][1]) if metadata else None,
        timestamp_unit=UNITS[edition],
    )


def _edition(path: Path) -> str:
    with open_text(path) as file:
        line = next((line for line in file if line.strip()), "")
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line 1: malformed JSON at column {error.colno}: {error.msg}; expected one review a line") from None
    for edition, names in FIELDS.items():
        if isinstance(fields, dict) and set(names) <= set(fields):
            return edition
    raise UserError(f"{path}: line 1: expected a review with the fields {', '.join(FIELDS['2018'])} (2018) or {', '.join(FIELDS['2023'])} (2023)")


def _batches(path: Path, names: tuple[str, str, str], rejects: Rejects) -> Iterator[pa.RecordBatch]:
    times = Times()
    schema = pa.schema([(names[0], pa.string()), (names[1], pa.string()), (names[2], pa.int64())])
    for block, first_line in json_blocks(path):
        table, lines = parse_block(path, block, first_line, schema, rejects)
        for batch in table.combine_chunks().to_batches():

            def places(rows: np.ndarray, lines: np.ndarray = lines) -> list[int]:
                return lines[rows].tolist()

            yield checked_batch(path, dict(zip(("user", "item", "time"), batch.columns, strict=True)), times, rejects, places)


def json_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[tuple[bytes, int]]:
    """(whole lines as bytes, number of the first one), a block at a time."""
    line = 1
    rest = b""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            while chunk := stream.read(size):
                cut = chunk.rfind(b"\n") + 1
                if cut == 0:
                    rest += chunk
                    continue
                block, rest = rest + chunk[:cut], chunk[cut:]
                yield block, line
                line += block.count(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read near line {line}: {error}") from None
    if rest.strip():
        yield rest, line


def parse_block(path: Path, block: bytes, first_line: int, schema: pa.Schema, rejects: Rejects) -> tuple[pa.Table, np.ndarray]:
    """(table of the schema's fields, line number of each row). Malformed lines go to `rejects`; only blocks that have some are read line by line."""

    def parse(data: bytes) -> pa.Table:
        if not data.strip():
            return schema.empty_table()
        return pajson.read_json(
            pa.BufferReader(data),
            pajson.ReadOptions(use_threads=False, block_size=len(data) + 1),
            pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )

    lines = block.split(b"\n")
    numbers = np.array([number for number, line in enumerate(lines, first_line) if line.strip()], np.int64)
    try:
        table = parse(block)
        if table.num_rows == len(numbers):
            return table, numbers
    except pa.ArrowInvalid:
        pass
    good: list[bytes] = []
    kept: list[int] = []
    for number in numbers.tolist():
        line = lines[number - first_line]
        reason = _complaint(line, schema)
        if reason:
            rejects.add(path, number, reason, line.decode("utf-8", "replace"))
        else:
            good.append(line)
            kept.append(number)
    return parse(b"\n".join(good)), np.array(kept, np.int64)


def _complaint(line: bytes, schema: pa.Schema) -> str | None:
    """Why a line is no row of the schema, or None."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"malformed JSON at column {error.colno}: {error.msg}"
    if not isinstance(value, dict):
        return f"expected a JSON object, found {type(value).__name__}"
    for field in schema:
        found = value.get(field.name)
        expected = int if pa.types.is_integer(field.type) else str
        if found is not None and type(found) is not expected:
            return f"field {field.name!r} is {found!r}, expected {'an integer' if expected is int else 'a string'}"
    return None


def _items(path: Path, key: str) -> pa.Table:
    """Titles and texts of the metadata; a product listed twice counts once."""
    ids: list[str] = []
    titles: list[str | None] = []
    texts: list[str | None] = []
    for block, first_line in json_blocks(path):
        for number, line in enumerate(block.split(b"\n"), first_line):
            if not line.strip():
                continue
            try:
                fields: dict[str, Any] = json.loads(line)
                item = fields[key]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: line {number}: expected a JSON object with the field {key!r}") from None
            ids.append(str(item))
            titles.append(text_of(fields.get("title")) or None)
            texts.append(" ".join(filter(None, (text_of(fields.get(name)) for name in TEXT_FIELDS))) or None)
    return first_rows(item_rows(ids, titles, texts))
