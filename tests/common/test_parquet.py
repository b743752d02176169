"""A damaged Parquet file is never taken for a whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.parquet import is_whole_parquet, read_checked, write_checked


@pytest.fixture
def table() -> pa.Table:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, 1000, 4).tolist() for _ in range(20)]
    columns = {"user": np.arange(20, dtype=np.int32), "items": items, "title": ["a", "b"] * 10}
    return pa.table(columns)


def test_each_byte_of_the_pages_is_guarded(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "a.parquet"
    write_checked(table, path)
    assert is_whole_parquet(path) and read_checked(path, "a table", "") == table
    content = path.read_bytes()
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    found = 0
    for position in range(4, end):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        if is_whole_parquet(path):
            # A header's word about its page that nobody reads.
            assert read_checked(path, "a table", "") == table, position
        else:
            found += 1
    assert found > (end - 4) / 2


def test_a_torn_file_and_no_file_are_not_whole(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "a.parquet"
    assert not is_whole_parquet(path)
    write_checked(table, path)
    content = path.read_bytes()
    # Without its end, and with blocks that never reached the disk.
    for damaged in (content[:-1], content[: len(content) // 2], b"", b"PAR1" + bytes(200)):
        path.write_bytes(damaged)
        assert not is_whole_parquet(path)
    path.write_bytes(content[:100] + bytes(60) + content[160:])
    assert not is_whole_parquet(path)
    with pytest.raises(UserError, match=f"^{path}: cannot be read as a table .*; mend it$") as e:
        read_checked(path, "a table", "mend it")
    assert "\n" not in str(e.value)
