"""Parquet files, a batch at a time, with damage as an error that names the row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError

BATCH_ROWS = 1_000_000
BUFFER_BYTES = 8 << 20


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file to be read in batches. Raises UserError where it is not Parquet."""
    try:
        # What is pre-buffered would stay in memory until the end.
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file: {reason}") from None


def parquet_batches(
    path: Path, file: pq.ParquetFile, names: list[str], rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yield columns of a file, at most `rows` at a time.

    Raises UserError where it is damaged.
    """
    batches, passed = file.iter_batches(rows, columns=names), 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: damaged after row {passed}: {reason}") from None
        yield batch
        passed += batch.num_rows
