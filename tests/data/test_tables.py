"""CSV and Parquet tables as other tools write them.

Columns of other types, bytes that are no text, item tables, folders of many files.
"""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.data.reading.parquet_file import open_parquet
from tests.support.csv_rows import GOOD, histories_of, unfiltered, write_csv


def test_bad_parquet_rows_are_named_by_row(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table(
            {"user": ["u", None, "u", "u"], "item": [1, 2, 3, 4], "timestamp": [1, 2, 3, None]}
        ),
        path,
    )
    with pytest.raises(UserError, match="rows.parquet: row 2: no user id"):
        prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")
    pq.write_table(pa.table({"user": [1.5], "item": [1], "timestamp": [1]}), path)
    with pytest.raises(
        UserError, match="the user column holds double, expected strings or integers"
    ):
        prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")
    path.write_text("not parquet")
    with pytest.raises(UserError, match="rows.parquet: not a readable Parquet file"):
        prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")


def of_bytes(values):
    """A string column of these bytes, whatever they are."""
    column = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers())


def test_parquet_columns_as_other_tools_write_them(tmp_path):
    path = tmp_path / "rows.parquet"

    def refused(message, **columns):
        pq.write_table(
            pa.table({"user": ["u"] * 3, "item": [1, 2, 3], "timestamp": [1, 2, 3]} | columns), path
        )
        with pytest.raises(UserError, match=f"rows.parquet: {message}"):
            prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")

    for name in ("user", "item", "timestamp"):
        refused("row 2: not UTF-8 text", **{name: of_bytes([b"1", b"2\xff", b"3"])})
        refused(
            "row 2: not UTF-8 text",
            **{
                name: pa.DictionaryArray.from_arrays(
                    pa.array([0, 1, 0], pa.int32()), of_bytes([b"1", b"2\xff"])
                )
            },
        )
    refused(
        "row 3: time 18446744073709551615 is not one: null, or too large",
        timestamp=pa.array([1, 2, 2**64 - 1], pa.uint64()),
    )
    refused(
        r"the time column holds list<.*>, expected integers, numbers, dates, timestamps or text",
        timestamp=[[1], [2], [3]],
    )
    refused(r"the item column holds list<.*>, expected strings or integers", item=[[1], [2], [3]])
    pq.write_table(
        pa.Table.from_arrays([pa.array([1])] * 4, ["user", "item", "item", "timestamp"]), path
    )
    with pytest.raises(
        UserError, match=r"rows.parquet: the column 'item' \(data.item_column\) occurs twice"
    ):
        prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")
    hashes = pa.array([2**64 - 1, 2**63, 70], pa.uint64())
    pq.write_table(
        pa.table(
            {
                "user": pa.array([2**64 - 2] * 3, pa.uint64()),
                "item": hashes,
                "timestamp": pa.array([3, 2, 1], pa.uint64()),
            }
        ),
        path,
    )
    prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert (
        list(dataset.item_ids) == ["70", str(2**63), str(2**64 - 1)]
        and dataset.items.tolist() == [0, 1, 2]
        and list(dataset.user_ids) == [str(2**64 - 2)]
    )


def test_rows_that_are_not_text_are_tolerated_and_counted(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table(
            {
                "user": ["u"] * 4,
                "item": of_bytes([b"1", b"2\xff", b"3", b"4"]),
                "timestamp": [1, 2, 3, 4],
            }
        ),
        path,
    )
    prepare(unfiltered(format="parquet", path=str(path), max_bad_rows=1), tmp_path / "out")
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert (reject["row"], reject["reason"]) == (2, "not UTF-8 text") and "2\ufffd" in reject[
        "text"
    ]
    assert list(load_dataset(tmp_path / "out").item_ids) == ["1", "3", "4"]


def test_item_tables_that_cannot_be_used_are_refused_by_line_row_or_column(tmp_path):
    config = write_csv(tmp_path / "rows.csv", GOOD)

    def refused(name, message):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            prepare(
                unfiltered(format="csv", path=config.path, items_path=str(tmp_path / name)),
                tmp_path / "out",
            )

    for content, message in (
        (
            b"item,title\n1,a\n2\n",
            r"line 3: malformed row: 1 fields, expected 2 .*; mend it: items are not skipped$",
        ),
        (b"item,title\n1,a\n,b\n", r"line 3: no item id; mend it"),
        (b"item,title\n1,a\n2,\xff\n", "line 3: not UTF-8 text"),
        (b"item,title,title\n1,a,b\n", r"the column 'title' \(data.items_path\) occurs twice"),
        (b"item,name\n1,a\n", r"no column 'title' \(data.items_path\)"),
        (b"item,title\n1,a\n1,b\n", "item '1' has 2 rows, expected one"),
        (b'item,title\n1,a\n2,"b\n3,c\n', "line 3: a quote mark of this row is left open"),
        (b"", "the file is empty, expected a header line"),
    ):
        (tmp_path / "items.csv").write_bytes(content)
        refused("items.csv", message)
    (tmp_path / "items.csv.gz").write_bytes(
        gzip.compress(
            b"item,title\n" + b"".join(b"%d,title %d\n" % (n, n * n) for n in range(9000))
        )[:-2000]
    )
    refused("items.csv.gz", "cannot be ")
    for columns, message in (
        ({"item": ["1", None], "title": ["a", "b"]}, "row 2: no item id"),
        (
            {
                "item": ["1", "2"],
                "title": pa.DictionaryArray.from_arrays(
                    pa.array([0, 1], pa.int32()), of_bytes([b"x", b"\xff"])
                ),
            },
            "row 2: 'title' is not UTF-8 text",
        ),
        (
            {"item": [1.5, 2.0], "title": ["a", "b"]},
            "column 'item' holds double, expected strings or integers",
        ),
        (
            {"item": ["1", "2"], "title": [["a"], ["b"]]},
            r"column 'title' holds list<.*>, expected text",
        ),
        (
            {"item": ["1", "2"], "title": ["a", "b"], "text": of_bytes([b"x", b"\xff"])},
            "row 2: 'text' is not UTF-8 text",
        ),
    ):
        pq.write_table(pa.table(columns), tmp_path / "items.parquet")
        refused("items.parquet", message)
    assert not (tmp_path / "out").exists()


def test_one_column_in_two_roles_is_refused(tmp_path):
    config = write_csv(tmp_path / "rows.csv", GOOD)
    with pytest.raises(
        UserError, match="data.user_column and data.item_column are both 'item'; name two columns"
    ):
        prepare(unfiltered(format="csv", path=config.path, user_column="item"), tmp_path / "out")


def test_files_of_a_folder_read_times_as_the_first_that_has_one(tmp_path):
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in" / "a.csv", [])
    write_csv(tmp_path / "in" / "b.csv", [("u", 1, "2.5"), ("u", 2, "1")])
    write_csv(tmp_path / "in" / "c.csv", [("u", 3, "2")])
    prepare(unfiltered(format="csv", path=str(tmp_path / "in")), tmp_path / "out")
    assert histories_of(load_dataset(tmp_path / "out")) == {"u": [2, 3, 1]}


def test_reading_parquet_holds_row_groups_and_not_the_file(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table(
        [np.random.default_rng(0).integers(0, 2**40, 1_000_000)] * 3, ["user", "item", "timestamp"]
    )
    pq.write_table(table, path, row_group_size=25_000, use_dictionary=False, compression="none")
    del table
    start = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - start for _ in open_parquet(path).iter_batches(25_000)]
    assert len(held) == 40 and max(held) < path.stat().st_size / 8


def test_an_unknown_column_names_the_nearest(tmp_path):
    config = write_csv(tmp_path / "rows.csv", GOOD, ("user", "itm", "timestamp"))
    with pytest.raises(
        UserError,
        match=r"rows.csv: no column 'item' \(data.item_column\); the nearest column is 'itm'; "
        "the file has: user, itm, timestamp",
    ):
        prepare(config, tmp_path / "out")
