"""Files that could be read in a wrong way: they are read right, or refused
in one line.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.data.reading.columns import UniqueIds
from ilrec_dist.data.reading.python_literal import MAX_CHARACTERS, parse_literal
from ilrec_dist.data.reading.table_signs import TableSigns
from ilrec_dist.export.interactions import export_data


def read(tmp_path: Path, form: str, path: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """(manifest, data set) of a file without a k-core."""
    options = {"min_user_interactions": 1, "min_item_interactions": 1} | options
    manifest = prepare(DataConfig(format=form, path=str(path), **options), tmp_path / "out")
    return manifest, load_dataset(tmp_path / "out")


def histories(dataset: InteractionDataset) -> dict[str, list[str]]:
    return {
        dataset.user_ids[user]: [dataset.item_ids[item] for item in dataset.sequence(user)]
        for user in range(dataset.num_users)
    }


def titles(dataset: InteractionDataset) -> dict[str, str]:
    return dict(zip(dataset.item_ids, dataset.titles or [], strict=True))


def kept_times(tmp_path: Path) -> list[int]:
    table = pq.read_table(tmp_path / "out" / "interactions.parquet")
    times: list[int] = table.column("timestamp").to_pylist()
    return times


# Sequences


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "1\t11\t5\t881250949\n2\t11\t3\t881250950\n1\t12\t4\t881250951\n",
            "line 3: user '1' .* 1",
        ),
        (
            "user\titem\trating\ttime\n7\t11\t5\t9\n\n7\t12\t5\t9\n",
            "line 4: user '7' begins line 2",
        ),
        ("1 11 12 13\n2 12 11 13\n1 14 15\n", "line 3: user '1' begins line 1"),
    ],
)
@pytest.mark.parametrize("allowed", [0, 99])
def test_a_table_is_not_read_as_sequences(tmp_path, text, lines, allowed):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(UserError, match=rf"rows\.txt: {lines} .*data.format (movielens|csv)"):
        read(tmp_path, "sequences", tmp_path / "rows.txt", max_bad_rows=allowed)


def rows_of(*columns: Callable[[int], object], separator: str = "\t", count: int = 40) -> str:
    """Lines of a user of their own and the columns' fields."""
    lines = ([f"u{row}", *(str(column(row)) for column in columns)] for row in range(count))
    return "".join(separator.join(line) + "\n" for line in lines)


def item(row: int) -> int:
    return row * 7919 % 1682 + 1


def stars(row: int) -> int:
    return row % 5 + 1


def seconds(row: int) -> int:
    return 881250949 + row * row


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        (rows_of(item, stars, seconds), r"line 1: field 4 \(881250949\) .*time.* movielens"),
        (rows_of(item, stars, seconds, separator="   "), "field 4 .* time"),
        ("user\titem\trating\ttime\n" + rows_of(item, stars, seconds), "line 2: field 4 .*time"),
        (rows_of(item, stars, lambda row: seconds(row) * 1000), "field 4 .* time"),
        (rows_of(item, stars, lambda row: f"{seconds(row)}.5", count=3), "field 4 .* time"),
        (rows_of(item, stars, lambda row: f"2018-10-0{row % 9 + 1}"), "field 4 .* time"),
        (rows_of(item, stars, lambda row: f"2018-10-0{row % 9 + 1} 12:00:00"), "field 4 .* time"),
        (rows_of(item, seconds, stars), "field 3 .* time"),
        (rows_of(item, seconds), "field 3 .* time"),
        (rows_of(item, lambda row: f"{row % 5}.5"), r"field 3 \(0.5\) looks like a rating"),
        (rows_of(item, stars, lambda row: f"shop{row % 3}"), "field 3 .* looks like a rating"),
        (rows_of(item, stars, seconds, separator=", "), "line 1: its fields end with commas"),
        (rows_of(item, separator=", "), "line 1: its fields end with commas"),
    ],
)
def test_a_table_of_users_with_one_row_each_is_not_read_as_sequences(tmp_path, text, sign):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(UserError, match=rf"rows\.txt: .*{sign}.*data\.format csv"):
        read(tmp_path, "sequences", tmp_path / "rows.txt")


@settings(max_examples=60)
@given(data=st.data())
def test_sequences_of_any_kind_of_ids_are_not_taken_for_a_table(data):
    """Small integers, ids as large as times, names; users with few items
    and with many.
    """
    kinds = {
        "small": st.integers(0, 10),
        "middle": st.integers(1, 5000),
        "large": st.integers(10**9, 4 * 10**9),
        "name": st.text("abc,.", min_size=1, max_size=3),
    }
    ids = kinds[data.draw(st.sampled_from(sorted(kinds)))].map(str)
    count = data.draw(st.sampled_from([st.just(2), st.just(3), st.integers(2, 6)]))
    lines = [
        [f"u{row}", *data.draw(count.flatmap(lambda n: st.lists(ids, min_size=n, max_size=n)))]
        for row in range(data.draw(st.integers(2, 25)))
    ]
    signs, cut = TableSigns(), data.draw(st.integers(1, len(lines) - 1))
    signs.add(pa.array(lines[:cut]), np.arange(cut))
    signs.add(pa.array(lines[cut:]), np.arange(cut, len(lines)))
    signs.check(Path("sequences.txt"))


def test_what_is_taken_for_a_table_can_be_said_in_sasrecs_form(tmp_path):
    rows = [line.split() for line in rows_of(item, stars, seconds).splitlines()]
    lines = [f"{user} {field}\n" for user, *fields in rows for field in fields]
    (tmp_path / "rows.txt").write_text("".join(lines))
    _, dataset = read(tmp_path, "sequences", tmp_path / "rows.txt")
    assert histories(dataset) == {user: fields for user, *fields in rows}


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_repeated_ids_are_found_over_batches_of_any_size(batch):
    ids = [f"user {number}" for number in range(500)]
    for repeat in (0, 250, 499):
        seen = UniqueIds(lambda *found: UserError(str(found)))
        rows = [*ids, ids[repeat], *ids[:5]]
        with pytest.raises(UserError) as raised:
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                seen.add(pa.array(part), pa.array(range(start, start + len(part))).to_numpy())
            seen.check()
        assert str(raised.value) == str((ids[repeat], repeat, 500))


# Blanks around ids


def test_blanks_around_ids_go_in_all_formats(tmp_path):
    expected = {"u 1": ["a", "b", "c"], "2": ["c", "b", "a"]}
    rows = [(user, item, time) for user in expected for time, item in enumerate(expected[user])]
    # Every second row has blanks around its ids, of kinds that files have.
    padded = [
        (f" {user}\u00a0", f"\u2003{item} ", time) if number % 2 else (user, item, time)
        for number, (user, item, time) in enumerate(rows)
    ]
    lines = [f"{user},{item},{time}" for user, item, time in padded]
    (tmp_path / "rows.csv").write_text("user, item ,timestamp\n" + "\n".join(lines) + "\n")
    columns = [list(column) for column in zip(*padded, strict=True)]
    pq.write_table(
        pa.table(dict(zip(("user", "item", "timestamp"), columns, strict=True))),
        tmp_path / "rows.parquet",
    )
    tabbed = "\n".join(line.replace(",", "\t") for line in lines)
    (tmp_path / "rows.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n" + tabbed + "\n"
    )
    (tmp_path / "u.data").write_text(
        "\n".join(f"{user}\t{item}\t5\t{time}" for user, item, time in padded) + "\n"
    )
    (tmp_path / "reviews.jsonl").write_text(
        "\n".join(
            json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time})
            for user, item, time in padded
        )
    )
    (tmp_path / "Toy.inter.json").write_text(
        json.dumps({" u 1": ["a", " b", "c\t"], "2\n": [" c ", "b", "a"]})
    )
    for form, name in (
        ("csv", "rows.csv"),
        ("parquet", "rows.parquet"),
        ("recbole", "rows.inter"),
        ("movielens", "u.data"),
        ("amazon", "reviews.jsonl"),
        ("lcrec", "Toy.inter.json"),
    ):
        assert histories(read(tmp_path, form, tmp_path / name)[1]) == expected, form


def test_lcrec_users_that_differ_in_blanks_are_not_merged(tmp_path):
    (tmp_path / "Toy.inter.json").write_text('{"7": ["a", "b", "c"], " 7": ["c", "b", "a"]}')
    with pytest.raises(UserError, match=r"Toy\.inter\.json: the key '7' occurs twice"):
        read(tmp_path, "lcrec", tmp_path)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_ids_of_blanks_are_no_ids(tmp_path, form):
    columns = {"user": ["u"] * 4, "item": ["a", " \t", "b", "c"], "timestamp": [1, 2, 3, 4]}
    path = tmp_path / f"rows.{form}"
    if form == "csv":
        rows = zip(*columns.values(), strict=True)
        path.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    else:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match=r"(line 3|row 2): no item id"):
        read(tmp_path, form, path)


# Item tables that do not join


def write_shop(folder: Path, item_rows: list[str]) -> dict[str, str]:
    """A CSV of 3 users with 4 items 1 … 4 each, and an item table of these lines."""
    rows = [f"u{user},{item},{item}" for user in range(3) for item in range(1, 5)]
    (folder / "rows.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    (folder / "items.csv").write_text("\n".join(["item,title", *item_rows]) + "\n")
    return {"items_path": str(folder / "items.csv")}


def test_an_item_table_that_fits_no_item_is_refused(tmp_path):
    settings = write_shop(tmp_path, [f"{item}.0,Title" for item in range(1, 5)])
    message = (
        r"items\.csv: no item of the 4 in .*rows\.csv has a row here: items are such as '1', "
        r"rows such as '1\.0'; write the ids in one way$"
    )
    with pytest.raises(UserError, match=message):
        read(tmp_path, "csv", tmp_path / "rows.csv", **settings)
    assert not (tmp_path / "out").exists()


def test_items_and_rows_without_each_other_are_counted_and_shown(tmp_path, capsys):
    settings = write_shop(tmp_path, [" 1 ,One", "2.0,Two", "9,Nine"])
    manifest, dataset = read(tmp_path, "csv", tmp_path / "rows.csv", **settings)
    assert titles(dataset) == {"1": "One", "2": "", "3": "", "4": ""}
    assert manifest["item_table"] == {
        "rows": 3,
        "items_without_row": 3,
        "rows_without_item": 2,
        "an_item_without_row": "2",
        "a_row_without_item": "2.0",
    }
    line = capsys.readouterr().out.strip()
    assert line == manifest["summary"]
    assert line.endswith(
        "3 of 4 items have no row in the item table, 2 of its 3 rows no item "
        "(no row: '2', no item: '2.0')"
    )
    settings = write_shop(tmp_path, ["1,One", "2,Two", "3,Three"])
    match = read(tmp_path, "csv", tmp_path / "rows.csv", **settings)[0]["item_table"]
    assert match == {"rows": 3, "items_without_row": 1, "rows_without_item": 0}


# Times


@pytest.mark.parametrize(
    ("rows", "kept", "unit"),
    [
        (["881250949", "881250950"], [881250949, 881250950], "seconds"),
        (["881250949.5", "881250950"], [881250949500, 881250950000], "milliseconds"),
        (["1997-12-04", "1997-12-05"], [881193600000, 881280000000], "milliseconds"),
    ],
)
def test_the_unit_of_movielens_times_is_that_of_what_is_kept(tmp_path, rows, kept, unit):
    rows = [*rows, rows[-1]]
    lines = [f"1,{item},5,{time}" for item, time in enumerate(rows)]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines))
    manifest, _ = read(tmp_path, "movielens", tmp_path)
    assert manifest["timestamps"] == f"{unit} since 1970"
    assert kept_times(tmp_path) == [*kept, kept[-1]]


@pytest.mark.parametrize(
    ("times", "kept", "unit"),
    [
        ([3, 1, 2], [1, 2, 3], "as in the file"),
        ([2**63 - 1, -(2**63), 0], [-(2**63), 0, 2**63 - 1], "as in the file"),
        (["3", "1", "2.5"], [1000, 2500, 3000], "thousandths of the numbers in the file"),
        (["3", "1", "2e1"], [1000, 3000, 20000], "thousandths of the numbers in the file"),
    ],
)
def test_recbole_times_that_are_integers_are_kept(tmp_path, times, kept, unit):
    rows = "".join(f"u\ti{row}\t{time}\n" for row, time in enumerate(times))
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + rows)
    manifest, _ = read(tmp_path, "recbole", tmp_path / "a.inter")
    assert kept_times(tmp_path) == kept and manifest["timestamps"] == unit
    for repeat in range(2):
        form, out = "recbole", tmp_path / f"out{repeat}"
        export_data(tmp_path / "out", form, out, "b")
        assert read(tmp_path, form, out)[0]["timestamps"] == "as in the file"
        assert kept_times(tmp_path) == kept, "at each reading"


def test_a_float_column_that_looks_like_times_is_used(tmp_path):
    rows = "u\tx\t3\t9\nu\ty\t1\t9\nu\tz\t2\t9\n"
    header = "user_id:token\titem_id:token\ttime:float\trating:float\n"
    (tmp_path / "a.inter").write_text(header + rows)
    manifest, dataset = read(tmp_path, "recbole", tmp_path / "a.inter")
    assert histories(dataset) == {"u": ["y", "z", "x"]}
    assert manifest["summary"].endswith("; times are those of column time:float")


def test_a_time_that_is_not_used_is_said(tmp_path):
    rows = "u\tx\t3\nu\ty\t1\nu\tz\t2\n"
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\tdate:token\n" + rows)
    manifest, dataset = read(tmp_path, "recbole", tmp_path / "a.inter")
    assert histories(dataset) == {"u": ["x", "y", "z"]}
    assert "no column timestamp:float: rows are taken in the order" in manifest["summary"]
    assert "date:token is not read" in manifest["summary"]
    header = "user_id:token\titem_id:token\tbegin_time:float\tend_time:float\n"
    (tmp_path / "a.inter").write_text(header + "u\tx\t3\t4\n")
    with pytest.raises(UserError, match="begin_time:float and end_time:float may both hold times"):
        read(tmp_path, "recbole", tmp_path / "a.inter")


# RecBole benchmark files


BENCHMARK = "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta\tb\nu\ta b\tc\n"


@pytest.mark.parametrize("name", ["ml.inter", "ml.train.inter"])
def test_rows_with_histories_are_refused(tmp_path, name):
    (tmp_path / name).write_text(BENCHMARK)
    message = r"\.inter: column item_id_list:token_seq holds histories, .* expected one NAME\.inter"
    with pytest.raises(UserError, match=message):
        read(tmp_path, "recbole", tmp_path / name)


def test_a_folder_of_benchmark_files_does_not_lead_to_one_of_them(tmp_path):
    plain = "user_id:token\titem_id:token\nu\ta\nu\tb\nu\tc\n"
    for text in (BENCHMARK, plain):
        for part in ("train", "valid", "test"):
            (tmp_path / f"ml.{part}.inter").write_text(text)
        for path in (tmp_path, tmp_path / "ml.train.inter"):
            with pytest.raises(UserError, match="benchmark files, each with a part") as raised:
                read(tmp_path, "recbole", path)
            assert "data.path" not in str(raised.value)
    (tmp_path / "ml.inter").write_text(plain)
    assert histories(read(tmp_path, "recbole", tmp_path)[1]) == {"u": ["a", "b", "c"]}


# Texts


NAN_TITLES = {"1": "One", "2": "", "3": "", "4": ""}


def test_nan_in_a_text_is_a_missing_field(tmp_path):
    settings = write_shop(tmp_path, ["1,One", "2,NaN", "3,nan", "4,"])
    assert titles(read(tmp_path, "csv", tmp_path / "rows.csv", **settings)[1]) == NAN_TITLES

    nan = float("nan")
    pq.write_table(pa.table({"item": ["1", "2"], "title": [nan, nan]}), tmp_path / "items.parquet")
    settings = {"items_path": str(tmp_path / "items.parquet")}
    assert read(tmp_path, "csv", tmp_path / "rows.csv", **settings)[1].titles is None

    reviews = [
        {"reviewerID": "u", "asin": str(item), "unixReviewTime": item} for item in range(1, 5)
    ]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    (tmp_path / "meta.jsonl").write_text(
        '{"asin": "1", "title": "One", "description": [NaN, "x"], "brand": NaN}\n'
        '{"asin": "2", "title": NaN}\n{"asin": "3", "title": "NaN"}\n{"asin": "4", "title": null}\n'
    )
    settings = {"items_path": str(tmp_path / "meta.jsonl")}
    _, dataset = read(tmp_path, "amazon", tmp_path / "reviews.jsonl", **settings)
    assert titles(dataset) == NAN_TITLES and list(dataset.texts) == ["x", "", "", ""]

    (tmp_path / "Toy.inter.json").write_text('{"u": [1, 2, 3, 4]}')
    (tmp_path / "Toy.item.json").write_text(
        '{"1": {"title": "One", "brand": NaN}, "2": {"title": NaN}, "3": {"title": -Infinity}}'
    )
    assert titles(read(tmp_path, "lcrec", tmp_path / "Toy.inter.json")[1]) == NAN_TITLES

    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\nu\t1\nu\t2\nu\t3\nu\t4\n")
    (tmp_path / "a.item").write_text(
        "item_id:token\ttitle:token_seq\tbrand:token\n1\tOne\tnan\n2\tnan\tB\n3\tNaN\t\n"
    )
    _, dataset = read(tmp_path, "recbole", tmp_path / "a.inter")
    assert titles(dataset) == NAN_TITLES and list(dataset.texts) == ["", "B", "", ""]


def test_nan_is_no_id_of_a_minionerec_history(tmp_path):
    header = "user_id,history_item_title,item_title,history_item_id,item_id\n"
    for split, rows in (
        ("train", 'u,"[nan, \'One\']",,"[2, 1]",3\nu,[],Three,[],3\n'),
        ("valid", "u,x,Two,[1],2\n"),
        ("test", 'u,x,nan,"[1, nan]",4\nu,x,nan,[1],4\n'),
    ):
        (tmp_path / split).mkdir()
        (tmp_path / split / "T.csv").write_text(header + rows)
    with pytest.raises(UserError, match=r"T\.csv: line 2: .* found history '\[1, nan\]'"):
        read(tmp_path, "minionerec", tmp_path)
    _, dataset = read(tmp_path, "minionerec", tmp_path, max_bad_rows=1)
    assert titles(dataset) == {"1": "One", "2": "Two", "3": "Three", "4": ""}


def test_texts_keep_their_spaces_so_that_an_item_file_comes_back(tmp_path):
    items = {
        "1": {"title": "A  title of  two  spaces ", "description": "Line one\n  line two\t end"},
        "2": {"title": "\u3000日本語 ", "description": ""},
    }
    (tmp_path / "Toy.inter.json").write_text('{"u": [1, 2, 1]}')
    (tmp_path / "Toy.item.json").write_text(json.dumps(items))
    read(tmp_path, "lcrec", tmp_path / "Toy.inter.json")
    export_data(tmp_path / "out", "lcrec", tmp_path / "exported", "Toy")
    assert json.loads((tmp_path / "exported" / "Toy.item.json").read_text()) == items
    export_data(tmp_path / "out", "recbole", tmp_path / "atomic", "Toy")
    _, dataset = read(tmp_path, "recbole", tmp_path / "atomic")
    assert list(dataset.titles) == [items["1"]["title"], items["2"]["title"]]


# Amazon 2014 and padded files


def test_metadata_of_2014_are_python_dicts(tmp_path):
    reviews = [
        {"reviewerID": "u", "asin": f"B{item}", "unixReviewTime": item} for item in (1, 2, 3)
    ]
    (tmp_path / "reviews.json").write_text("\n".join(map(json.dumps, reviews)))
    meta = tmp_path / "meta.json"
    meta.write_text(
        "{'asin': 'B1', 'salesRank': {'Books': 63}, 'categories': [['Books', 'Art']], "
        "'title': \"An artist's book\"}\n"
        "{'asin': 'B2', 'title': 'Second', 'description': nan}\n"
    )
    settings = {"items_path": str(meta)}
    _, dataset = read(tmp_path, "amazon", tmp_path / "reviews.json", **settings)
    assert titles(dataset) == {"B1": "An artist's book", "B2": "Second", "B3": ""}
    assert list(dataset.texts) == ["Books Art", "", ""]
    for bad in (
        "{'asin': __import__('os').getpid()}",
        "{'asin': " + "(" * 5000,
        "{'asin': 'B1', 'title': '" + "x" * MAX_CHARACTERS + "'}",
        "{'asin': " + "9" * 5000 + "}",
    ):
        meta.write_text(f"{bad}\n")
        with pytest.raises(UserError, match=r"meta\.json: line 1: expected a JSON object with"):
            read(tmp_path, "amazon", tmp_path / "reviews.json", **settings)
    (tmp_path / "reviews.json").write_text("\n".join(map(repr, reviews)))
    with pytest.raises(UserError, match=r"reviews\.json: line 1: a Python dict, not JSON; write"):
        read(tmp_path, "amazon", tmp_path / "reviews.json")


def test_literals_run_no_code_and_nan_is_missing():
    assert parse_literal("[nan, 'nan', {'a': (1, 2.5)}]") == [None, "nan", {"a": (1, 2.5)}]
    for text in ("nan()", "x", "[1, inf]", "", "1 +", "f'{1}'", "-" * 20000 + "1"):
        with pytest.raises(ValueError):
            parse_literal(text)


@pytest.mark.parametrize("padding", [1, 511, 1 << 20])
def test_gzip_files_that_are_padded_with_zero_bytes_are_read(tmp_path, padding):
    rows = "".join(f"u,{item},{item}\n" for item in range(2000))
    half = len(rows) // 2
    # Two members, as `cat a.gz b.gz` leaves them.
    packed = gzip.compress(f"user,item,timestamp\n{rows[:half]}".encode())
    packed += gzip.compress(rows[half:].encode()) + bytes(padding)
    (tmp_path / "rows.csv.gz").write_bytes(packed)
    assert read(tmp_path, "csv", tmp_path / "rows.csv.gz")[0]["interactions"] == 2000
    reviews = [
        {"reviewerID": "u", "asin": f"B{item}", "unixReviewTime": item} for item in (1, 2, 3)
    ]
    text = "\n".join(map(json.dumps, reviews))
    (tmp_path / "reviews.json.gz").write_bytes(gzip.compress(text.encode()) + bytes(padding))
    assert read(tmp_path, "amazon", tmp_path / "reviews.json.gz")[0]["interactions"] == 3


# What the user is told


def test_users_without_items_are_counted_and_said(tmp_path, capsys):
    (tmp_path / "Toy.inter.json").write_text('{"a": [1, 2, 3], "b": [], "c": [], "d": [3, 2, 1]}')
    manifest, dataset = read(tmp_path, "lcrec", tmp_path)
    assert list(dataset.user_ids) == ["a", "d"]
    assert manifest["read"]["users_without_interactions"] == 2
    assert "dropped 2 users without interactions; kept" in capsys.readouterr().out


def test_one_line_says_what_was_read_dropped_and_kept(tmp_path, capsys):
    rows = [f"u{user},{item},{item}" for user in range(4) for item in range(3)]
    rows += [rows[0], "u0,,7", "single,2,1", "single,9,2"]
    (tmp_path / "rows.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    manifest, _ = read(
        tmp_path,
        "csv",
        tmp_path / "rows.csv",
        max_bad_rows=1,
        min_user_interactions=3,
        min_item_interactions=2,
    )
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert (
        line
        == manifest["summary"]
        == (
            "csv: read 15 interactions of 5 users and 4 items; dropped 1 bad rows (rejects.jsonl), "
            "1 exact repeats, 1 users (20%) and 1 items (25%) with 2 interactions below the k-core "
            "(3 per user, 2 per item); kept 12 interactions of 4 users and 3 items"
        )
    )
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written == manifest


def test_an_item_table_that_fits_is_said_in_few_words(tmp_path):
    settings = write_shop(tmp_path, [f"{item},Title" for item in range(1, 5)])
    summary = read(tmp_path, "csv", tmp_path / "rows.csv", **settings)[0]["summary"]
    assert summary == (
        "csv: read 12 interactions of 3 users and 4 items; kept 12 interactions of 3 users and "
        "4 items; every item has a row in the item table"
    )
