"""The text files of S3Rec (a user and all items a line) and SASRec (a user and one item a line), in chronological order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.files import require_file
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.formats.delimited import open_text
from ilrec_dist.data.formats.lines import line_blocks
from ilrec_dist.data.formats.source import Rejects, Source
from ilrec_dist.data.formats.tables import read_item_table, table_files


def sequences_files(config: DataConfig) -> list[Path]:
    """The sequences and the item table (`data.items_path`), which these formats lack."""
    return table_files(config)


def read_sequences(config: DataConfig) -> Source:
    """SASRec's form where the first line has two numbers, S3Rec's where it has more."""
    path = require_file(config.path or "", "data.path")
    with open_text(path) as file:
        first: list[str] = next((line.split() for line in file if line.strip()), [])
    return Source(
        path,
        timed=False,
        batches=lambda rejects: _batches(path, len(first) == 2, rejects),
        item_table=lambda: read_item_table(config),
    )


def _batches(path: Path, pairs: bool, rejects: Rejects) -> Iterator[pa.RecordBatch]:
    for block, first_line in line_blocks(path):
        lines = (
            pc.split_pattern(
                pa.array([block], pa.large_binary()).cast(pa.large_string()), "\n"
            ).values
            if _is_text(block)
            else None
        )
        if lines is None:
            texts = [
                _decoded(path, line, number, rejects)
                for number, line in enumerate(block.split(b"\n"), first_line)
            ]
            lines = pa.array(texts, pa.large_string())
        fields = pc.split_pattern(
            pc.ascii_trim_whitespace(pc.replace_substring_regex(lines, "[ \t\r]+", " ")), " "
        )
        counts = pc.list_value_length(fields).to_numpy(zero_copy_only=False).astype(np.int64)
        counts[
            pc.equal(pc.binary_length(pc.ascii_trim_whitespace(lines)), 0).to_numpy(
                zero_copy_only=False
            )
        ] = 0
        bad = ((counts != 2) if pairs else (counts < 2)) & (counts != 0)
        for row in np.flatnonzero(bad).tolist():
            reason = f"{counts[row]} fields, expected a user and {'an item, as in the first line' if pairs else 'its items'}"
            rejects.add(path, first_line + row, reason, lines[row].as_py())
        fields = fields.filter(pa.array((counts > 0) & ~bad))
        if len(fields):
            parents = pc.list_parent_indices(fields).to_numpy()
            flat = pc.list_flatten(fields)
            offset = np.ones(len(flat), bool)
            offset[np.flatnonzero(np.diff(parents, prepend=-1))] = (
                False  # the first field of a line is the user
            )
            users = pc.list_element(fields, 0).take(pa.array(parents[offset]))
            yield pa.record_batch({"user": users, "item": flat.filter(pa.array(offset))})


def _is_text(block: bytes) -> bool:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoded(path: Path, line: bytes, number: int, rejects: Rejects) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        rejects.add(path, number, "not UTF-8 text", line.decode("utf-8", "replace"))
        return ""
