"""Parquet files that another process may have left unfinished."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def is_whole_parquet(path: Path) -> bool:
    """Whether the file has its end, which it may have lost with the machine's power."""
    try:
        pq.read_metadata(path)
        return True
    except (OSError, pa.ArrowInvalid):
        return False
