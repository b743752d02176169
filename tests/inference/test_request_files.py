"""Histories in Parquet files as other tools write them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.inference.request_files import Histories, HistoriesFile

ITEMS = {"1": 0, "2": 1, "b c": 2}


def read(path: Path, rows: int = 100) -> list[Histories]:
    file = HistoriesFile(path, ITEMS)
    file.check()
    return [part for _, part in file.parts(rows)]


@pytest.mark.parametrize(
    "dtype",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 2),
        pa.list_view(pa.string()),
        pa.large_list_view(pa.string()),
        pa.list_(pa.int64(), 2),
    ],
    ids=str,
)
def test_every_type_of_list_is_one(tmp_path: Path, dtype: pa.DataType) -> None:
    rows = [[1, 2], [2, 1]] if dtype.value_type == pa.int64() else [["1", "2"], ["2", "1"]]
    table = pa.table({"user": ["u", "v"], "items": pa.array(rows, dtype)})
    pq.write_table(table, tmp_path / "histories.parquet")
    (both,) = read(tmp_path / "histories.parquet")
    assert both.users == ["u", "v"] and both.ranges.items.tolist() == [0, 1, 1, 0]
    first, second = read(tmp_path / "histories.parquet", 1)
    assert first.users == ["u"] and first.ranges.items.tolist() == [0, 1]
    assert second.users == ["v"] and second.ranges.items.tolist() == [1, 0]


def test_blanks_around_ids_are_no_part_of_them(tmp_path: Path) -> None:
    path = tmp_path / "histories.parquet"
    pq.write_table(pa.table({"user": ["u ", " v"], "items": [[" 1", "b c\n"], ["2"]]}), path)
    (both,) = read(path)
    assert both.users == ["u", "v"] and both.ranges.items.tolist() == [0, 2, 1]
    pq.write_table(pa.table({"user": ["u", "u "], "items": [["1"], ["2"]]}), path)
    with pytest.raises(UserError, match="row 2 repeats the user 'u' of row 1"):
        read(path)
