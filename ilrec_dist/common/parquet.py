"""Parquet files that another process may have left unfinished."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError


def write_checked(table: pa.Table, path: str | Path) -> None:
    """Write a file whose damage `is_whole_parquet` and `read_checked` find: its pages
    have checksums.
    """
    pq.write_table(table, path, write_page_checksum=True)


def read_checked(path: str | Path, what: str, repair: str) -> pa.Table:
    """Read what `write_checked` wrote.

    Raises UserError where the file is missing or damaged, with `what` it should be and
    what to do about it.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as {what} ({reason}); {repair}") from None


def is_whole_parquet(path: Path) -> bool:
    """Whether the file is there with all its pages as they were written.

    It may have lost some with the machine's power. All of it is read, a row group at a
    time.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                file.read_row_group(number)
        return True
    except (OSError, pa.ArrowException):
        return False
