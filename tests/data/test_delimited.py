"""Delimited text: quoted line breaks, the lines that errors name, and what finding them
costs.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.data.reading import delimited, lines, times
from ilrec_dist.data.reading.delimited import Dialect, read_columns
from ilrec_dist.data.reading.source import Rejects
from ilrec_dist.data.reading.times import Times

ITEMS = [
    "7",
    "B00A",
    '"B, 1"',
    '"two\nlines"',
    '"a ""quoted"" one"',
    '"\n\n""\r\n"',
    '5" disk',
    '"x"y"',
    '""""',
    "é",
]


def csv_config(path, **settings) -> DataConfig:
    return DataConfig(
        format="csv", path=str(path), min_user_interactions=1, min_item_interactions=1, **settings
    )


@pytest.mark.parametrize("seed", range(12))
def test_rows_have_the_lines_that_an_editor_shows(tmp_path, monkeypatch, seed):
    """Quoted line breaks, empty lines, BOMs and too few fields, in blocks
    of any size.
    """
    rng = random.Random(seed)
    text = rng.choice(["", "\ufeff", "\n\r\n"]) + rng.choice(
        ["user,item,note\n", '"user",item,"a\nnote"\r\n']
    )
    good, bad = [], []
    for number in range(rng.choice([1, 60, 300])):
        line = text.count("\n") + 1
        item = rng.choice(ITEMS)
        if rng.random() < 0.1:
            # A bad row counts with all of its lines.
            bad += range(line, line + 1 + item.count("\n"))
            text += f"{number},{item}"
        else:
            good.append((str(number), line))
            text += f"{number},{item},{rng.choice(['', 'x', ITEMS[3]])}"
        text += rng.choice(["\n", "\n", "\r\n", "\n\n", "\n\r\n"])
    path = tmp_path / "rows.csv"
    path.write_bytes(text.removesuffix("\n").encode())
    monkeypatch.setattr(delimited, "BLOCK_BYTES", rng.choice([100, 333, 1 << 20]))
    monkeypatch.setattr(
        lines,
        "line_blocks",
        functools.partial(lines.line_blocks, size=rng.choice([1, 50, 1000, 1 << 20])),
    )
    rejects = Rejects(1000)
    found = []
    for batch, places in read_columns(path, ["user"], {}, Dialect(), rejects):
        rows = np.arange(batch.num_rows)
        # Some batches have no bad rows.
        asked = rows[rng.randrange(2) :: rng.choice([1, 3])] if rng.random() < 0.7 else rows[:0]
        found += zip(batch.column("user").take(asked).to_pylist(), places.at(asked), strict=True)
    assert set(found) <= set(good) and [reject["line"] for reject in rejects.rows] == bad


def test_rows_that_the_parser_drops_while_others_are_reported(tmp_path, monkeypatch):
    """The parser may run ahead in a thread of its own.

    None of its bad rows is lost, or named by the line of another.
    """
    of, open_csv, count = lines.RecordLines.of, delimited.pacsv.open_csv, 900

    def ahead(*arguments):
        reader = open_csv(*arguments)
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(next, reader, None)
            while (batch := following.result()) is not None:
                following = pool.submit(next, reader, None)
                yield batch

    monkeypatch.setattr(delimited.pacsv, "open_csv", ahead)
    monkeypatch.setattr(
        lines.RecordLines, "of", lambda *arguments: (time.sleep(0.01), of(*arguments))[1]
    )
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 500)
    path = tmp_path / "rows.csv"
    path.write_text(
        "user,item\n" + "".join(f"{row},7\n" if row % 3 else f"{row}\n" for row in range(count))
    )
    rejects = Rejects(count)
    users = [
        user
        for batch, _ in read_columns(path, ["user"], {}, Dialect(), rejects)
        for user in batch.column(0).to_pylist()
    ]
    assert users == [str(row) for row in range(count) if row % 3]
    assert [(reject["line"], reject["text"]) for reject in rejects.rows] == [
        (row + 2, str(row)) for row in range(0, count, 3)
    ]


def test_quoted_line_breaks_across_blocks_and_the_line_of_a_row_after_them(tmp_path, monkeypatch):
    rows = b"".join(
        b'%d,%d,%d,"two\nlines"\r\n' % (number % 3, number % 5, number) for number in range(30)
    )
    path = tmp_path / "reviews.csv"
    path.write_bytes("\ufeffuser,item,timestamp,note\r\n".encode() + rows + b"1,,7,x\r\n")
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 200)
    with pytest.raises(UserError, match=r"reviews\.csv: line 62: no item id"):
        prepare(csv_config(path), tmp_path / "out")
    prepare(csv_config(path, max_bad_rows=1), tmp_path / "out")
    assert load_dataset(tmp_path / "out").num_interactions == 30
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["line"] == 62


def test_a_quote_left_open_is_named(tmp_path, monkeypatch):
    rows = [f"{number % 3},{number % 5},{number}" for number in range(200)]
    path = tmp_path / "rows.csv"
    path.write_text("user,item,timestamp\n" + "\n".join([*rows[:50], '1,"2,50', *rows[50:]]) + "\n")
    for allowed in (0, 1000):
        with pytest.raises(
            UserError, match=r"rows\.csv: line 52: a quote mark of this row is left open"
        ):
            prepare(csv_config(path, max_bad_rows=allowed), tmp_path / "out")
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 64)
    with pytest.raises(
        UserError,
        match=r"rows\.csv: cannot be read: from line \d+ on, a row is longer than 64 bytes; "
        r"is a quote mark left open\?$",
    ):
        prepare(csv_config(path), tmp_path / "out")


@pytest.mark.parametrize("allowed", [0, 9])
def test_a_malformed_row_that_is_no_text_is_named_too(tmp_path, allowed):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"user,item,timestamp\n1,2,3\n\n1,3,4\n1,\xff\n1,4,5\n")
    with pytest.raises(
        UserError,
        match=r"rows\.csv: line 5: malformed row, and not UTF-8 text; mend it: "
        r"such rows cannot be skipped$",
    ):
        prepare(csv_config(path, max_bad_rows=allowed), tmp_path / "out")


def test_nothing_but_the_error_is_said_of_such_a_row(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"user,item\n1,2\n\xff\n")
    code = (
        "from ilrec_dist.data.reading.delimited import *\n"
        "list(read_columns(Path('rows.csv'), ['user'], {}, Dialect(), Rejects()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.stderr.splitlines()[-1].endswith(
        "line 3: malformed row, and not UTF-8 text; mend it: such rows cannot be skipped"
    )
    assert "UnicodeDecodeError" not in found.stderr


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_quote_left_open_in_a_column_that_is_not_read_loses_no_rows_in_silence(tmp_path, ending):
    path = tmp_path / "rows.csv"
    rows = [
        "user,item,timestamp,note",
        "1,2,3,fine",
        "1,3,4,",
        '1,4,5,"left open',
        "2,5,6,x",
        "2,6,7,x",
    ]
    path.write_text("\n".join(rows) + ending)
    with pytest.raises(
        UserError,
        match=r"rows\.csv: line 4: a quote mark of this row is left open: all rows behind it",
    ):
        prepare(csv_config(path), tmp_path / "out")
    (tmp_path / "alone.csv").write_text('user,item,timestamp,note\n1,2,3,"open' + ending)
    with pytest.raises(UserError, match=r"alone\.csv: line 2: a quote mark"):
        prepare(csv_config(tmp_path / "alone.csv"), tmp_path / "out")


def test_each_line_of_a_malformed_row_counts(tmp_path):
    """A quote that another row's closes may have swallowed good rows: they are not lost
    as one.
    """
    path = tmp_path / "rows.csv"
    path.write_text('user,item,timestamp\n1,1,1\n1,"2,2\n1,3,3\n1,4,4\n1,5"\n1,6,6\n1,7,7\n')
    message = (
        r"malformed row: 2 fields, expected 3 \(','-separated\), over 4 lines; "
        r"is a quote mark left open\?; mend it"
    )
    with pytest.raises(UserError, match=rf"rows\.csv: line 3: {message}"):
        prepare(csv_config(path), tmp_path / "out")
    with pytest.raises(
        UserError,
        match=r"rows\.csv: line 6: in the malformed row that begins on line 3 \(bad row 4",
    ):
        prepare(csv_config(path, max_bad_rows=3), tmp_path / "out")
    read = prepare(csv_config(path, max_bad_rows=4), tmp_path / "out")["read"]
    assert (read["interactions"], read["bad_rows"]) == (3, 4)
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [(reject["line"], reject["text"]) for reject in rejects] == [
        (3, '1,"2,2'),
        (4, "1,3,3"),
        (5, "1,4,4"),
        (6, '1,5"'),
    ]


@pytest.mark.parametrize(
    "text", ["user,item,timestamp", "user,item,timestamp\n", "\n\nuser,item,timestamp\r\n\n"]
)
def test_a_header_alone_has_no_interactions(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.csv: no interactions$"):
        prepare(csv_config(path), tmp_path / "out")


def test_a_column_named_twice_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("user,item,timestamp,item\n1,2,3,4\n")
    with pytest.raises(
        UserError,
        match=r"rows\.csv: the column 'item' \(data.item_column\) occurs twice; "
        "rename or drop one of them",
    ):
        prepare(csv_config(path), tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["soon", None, "7", "2020-01-01", "9"], [None, None, 7, None, 9]),
        (["", "2020-13-45", "2020-01-01", "7"], [None, None, 1577836800000, None]),
        (
            ["1577836800123456789", "-9223372036854775807", "9223372036854775807"],
            [1577836800123456789, -(2**63) + 1, 2**63 - 1],
        ),
        (
            ["1", "9223372036854775808", "-9999999999999999999", "12345678901234567890", "x"],
            [1, None, None, None, None],
        ),
        (["1.5", "9e15", "-2e-3", "inf"], [1500, None, -2, None]),
        (["soon", "later"], [None, None]),
    ],
)
def test_the_first_time_decides_how_all_are_read(values, expected):
    assert Times().parse(pa.array(values, pa.string())).to_pylist() == expected
    times = Times()
    assert [
        times.parse(pa.array([value], pa.string()))[0].as_py() for value in values
    ] == expected, "over batches too"


def test_however_many_bad_rows_the_file_is_read_twice(tmp_path, monkeypatch):
    rows = [f"{number % 50},{number % 40},{number}" for number in range(4000)]
    for place in range(0, 4000, 8):
        rows[place] = ("x,y", ",1,1", "1,,1", "1,2,soon")[place // 8 % 4]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["user,item,timestamp", *["7,7,7"] * 3, *rows]) + "\n")
    read = []

    def counted(path, size=500):
        for block in blocks(path, size):
            read.append(len(block[0]))
            yield block

    def opened(path, encoding="utf-8"):
        read.append(0)
        return open_text(path, encoding)

    blocks, open_text = lines.line_blocks, delimited.open_text
    monkeypatch.setattr(delimited, "open_text", opened)
    monkeypatch.setattr(lines, "line_blocks", counted)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 2000)
    prepare(csv_config(path, max_bad_rows=500), tmp_path / "out")
    assert 0 < sum(read) <= path.stat().st_size and read.count(0) == 1, (
        "one pass for the lines, one look at the header"
    )
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert sorted(reject["line"] for reject in rejects) == [
        place + 5 for place in range(0, 4000, 8)
    ]
    assert {reject["text"] for reject in rejects if "malformed" in reject["reason"]} == {"x,y"}


def test_empty_lines_before_the_header_and_commas_within_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\n\n"a, b",user,item\n1,u,x\n2,u,y\n3,u,z\n4,,z\n')
    with pytest.raises(UserError, match=r"rows\.csv: line 7: no user id"):
        prepare(csv_config(path, time_column=None), tmp_path / "out")
    manifest = prepare(csv_config(path, time_column=None, max_bad_rows=1), tmp_path / "out")
    assert manifest["interactions"] == 3


DATES = {
    "date": [
        "2018-07-01",
        "2018-07-01 10:30:00",
        "2018-07-01T10:30:00.5",
        "2018-07-01 10:30:00.123456",
        "2018-07-01 10:30:00.123456789",
        "1969-12-31",
    ],
    "zoned date": [
        "2018-07-01T10:30:00Z",
        "2018-07-01 12:30:00+02:00",
        "2018-07-01T10:30:00.1234567Z",
        "2018-07-01T10:30:00.123456-0730",
    ],
}
MORNING = 1530441000000
TIMES = {
    "date": [MORNING - 37800_000, MORNING, MORNING + 500, MORNING + 123, MORNING + 123, -86400_000],
    "zoned date": [MORNING, MORNING, MORNING + 123, MORNING + 123 + 27000_000],
}
NO_DATES = [
    "soon",
    "",
    None,
    "2018-02-30",
    "2018-13-01",
    "2018-07-01 25:00:00",
    "1530403200",
    "2018-07-01T10:30",
    "01.07.2018",
    "2018-07-01 10:30:00 ",
]


@pytest.mark.parametrize("kind", DATES)
def test_dates_to_the_millisecond_whatever_stands_beside_them(kind):
    # These are dates without a zone.
    no_dates = [
        value
        for value in NO_DATES
        if value not in ("2018-07-01T10:30", "2018-07-01 10:30:00 ") or kind == "zoned date"
    ]
    times = Times(kind)
    assert [times.parse(pa.array([value])).to_pylist() for value in DATES[kind]] == [
        [value] for value in TIMES[kind]
    ]
    mixed = [value for pair in zip(DATES[kind] * 9, no_dates * 9, strict=False) for value in pair]
    expected = [dict(zip(DATES[kind], TIMES[kind], strict=True)).get(value) for value in mixed]
    assert times.parse(pa.array(mixed)).to_pylist() == expected


def test_only_bad_dates_are_tried_singly(monkeypatch):
    tried = []

    def counted(count, works):
        return failing_rows(
            count, lambda first, last: tried.append(last - first) or works(first, last)
        )

    failing_rows = times.failing_rows
    monkeypatch.setattr(times, "failing_rows", counted)
    dates = [f"2018-07-{1 + number % 30:02} 10:30:00" for number in range(100_000)]
    dates[500:60_000:7] = ["unknown"] * len(dates[500:60_000:7])
    dates[77_777] = "2018-06-31"
    assert Times("date").parse(pa.array(dates)).null_count == len(range(500, 60_000, 7)) + 1
    assert len(tried) < 40
