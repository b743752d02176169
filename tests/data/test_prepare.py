"""`prepare` from files to the canonical folder.

Order, filter, manifest, errors, and that nothing is left half-written.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.formats.lcrec import read_lcrec
from ilrec_dist.data.prepare import input_files, prepare
from ilrec_dist.export.interactions import export_data
from tests.support.csv_rows import GOOD, histories_of, unfiltered, write_csv
from tests.support.masks import train_mask
from tests.support.shared_data import shared_data

HISTORIES = {"3": [1, 2, 3, 4], "10": [4, 3, 2, 1, 5], "4": [2, 3, 5]}
ITEMS = {
    str(item): {"title": f"Title {item}", "brand": "B", "categories": ["x", "y"]}
    for item in range(1, 6)
}


def write_lcrec(folder, histories=HISTORIES, items=ITEMS):
    folder.mkdir(exist_ok=True)
    text = histories if isinstance(histories, str | bytes) else json.dumps(histories)
    (folder / "Toy.inter.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if items is not None:
        (folder / "Toy.item.json").write_text(json.dumps(items))
    return unfiltered(format="lcrec", path=str(folder))


def rows_of(histories):
    return [
        (user, str(item), time)
        for user, items in histories.items()
        for time, item in enumerate(items)
    ]


def test_lcrec_keeps_every_history_and_orders_ids_by_value(tmp_path):
    manifest = prepare(write_lcrec(tmp_path / "in"), tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert histories_of(dataset) == HISTORIES
    assert list(dataset.user_ids) == ["3", "4", "10"] and list(dataset.item_ids) == [
        "1",
        "2",
        "3",
        "4",
        "5",
    ]
    assert dataset.titles[0] == "Title 1" and dataset.texts[4] == "B x y"
    assert (manifest["users"], manifest["items"], manifest["interactions"]) == (3, 5, 12)
    assert dataset.items.dtype == np.int32 and dataset.offsets.dtype == np.int64


def test_leave_one_out_helpers(tmp_path):
    prepare(write_lcrec(tmp_path / "in"), tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert dataset.targets("test").tolist() == [3, 4, 4] and dataset.targets(
        "validation"
    ).tolist() == [2, 2, 0]
    assert dataset.train_lengths().tolist() == [2, 1, 3]
    assert train_mask(dataset).tolist() == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert dataset.history_stop("test").tolist() == [3, 6, 11]


def test_sequences_are_mapped_and_texts_read_when_used(tmp_path):
    prepare(write_lcrec(tmp_path / "in"), tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert isinstance(dataset.items.base, np.memmap) and isinstance(dataset.offsets.base, np.memmap)
    assert (
        pq.read_table(tmp_path / "out" / "interactions.parquet")["item"].to_pylist()
        == dataset.items.tolist()
    )
    assert "column" not in vars(dataset.user_ids) and len(dataset.user_ids) == 3
    assert dataset.user_ids[1:] == ["4", "10"] and "column" in vars(dataset.user_ids)


def test_manifest_names_the_content_hashes_and_is_the_same_for_the_same_input(tmp_path):
    config = write_lcrec(tmp_path / "in")
    first, second = prepare(config, tmp_path / "a"), prepare(config, tmp_path / "b")
    assert first == second == json.loads((tmp_path / "a" / "manifest.json").read_text())
    for name, entry in first["files"].items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == entry["sha256"]
    for path in input_files(config):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == first["inputs"][path.name]["sha256"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet"])
def test_tables_give_what_the_lcrec_triple_gives(tmp_path, kind):
    rows = rows_of(HISTORIES)
    order = np.random.default_rng(0).permutation(len(rows))
    table = pa.table(
        [pa.array(column) for column in zip(*(rows[i] for i in order), strict=True)],
        ["who", "what", "when"],
    )
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        # The stream compresses by the file's ending.
        with pa.output_stream(path) as stream:
            pacsv.write_csv(
                table, stream, pacsv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
            )
    items = tmp_path / "items.csv"
    items.write_text('item,title\n1,"A title, with a comma"\n2,"and a\nline break"\n')
    config = unfiltered(
        format="parquet" if kind == "parquet" else "csv",
        path=str(path),
        items_path=str(items),
        user_column="who",
        item_column="what",
        time_column="when",
    )
    prepare(config, tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert histories_of(dataset) == HISTORIES
    assert (
        list(dataset.titles) == ["A title, with a comma", "and a\nline break", "", "", ""]
        and dataset.texts is None
    )
    assert pq.read_schema(tmp_path / "out" / "interactions.parquet").names == [
        "user",
        "item",
        "timestamp",
    ]


def test_without_a_time_column_rows_are_in_order(tmp_path):
    config = write_csv(
        tmp_path / "rows.csv",
        [("a", 3), ("b", 1), ("a", 1), ("b", 3), ("a", 2), ("b", 2)],
        ("user", "item"),
    )
    prepare(unfiltered(format="csv", path=config.path, time_column=None), tmp_path / "out")
    assert histories_of(load_dataset(tmp_path / "out")) == {"a": [3, 1, 2], "b": [1, 3, 2]}


@pytest.mark.parametrize("dtype", [pa.timestamp("us"), pa.date32(), pa.float64(), pa.int32()])
def test_parquet_times_of_any_type_order_the_rows(tmp_path, dtype):
    times = pa.array([3, 1, 2], pa.int32())
    times = (
        pc_multiply(times, 1e6).cast(pa.int64()).cast(dtype)
        if pa.types.is_timestamp(dtype)
        else times.cast(dtype)
    )
    pq.write_table(
        pa.table({"user": [7, 7, 7], "item": ["x", "y", "z"], "timestamp": times}),
        tmp_path / "rows.parquet",
    )
    prepare(unfiltered(format="parquet", path=str(tmp_path / "rows.parquet")), tmp_path / "out")
    assert [
        load_dataset(tmp_path / "out").item_ids[item]
        for item in load_dataset(tmp_path / "out").items
    ] == ["y", "z", "x"]


def pc_multiply(array, factor):
    return pa.array(array.to_numpy() * factor)


def test_exact_repeats_go_and_the_core_is_taken_after_that(tmp_path):
    rows = (
        [("a", item, 1) for item in (1, 2, 3)]
        + [("b", item, 5) for item in (1, 2, 3)]
        + [("c", 1, 1), ("c", 1, 1), ("c", 1, 1)]
    )
    config = write_csv(tmp_path / "rows.csv", rows)
    manifest = prepare(
        DataConfig(
            format="csv", path=config.path, min_user_interactions=3, min_item_interactions=2
        ),
        tmp_path / "out",
    )
    assert manifest["read"]["repeats_dropped"] == 2
    assert manifest["k_core"] == {
        "min_user_interactions": 3,
        "min_item_interactions": 2,
        "rounds": 2,
        "users_removed": 1,
        "items_removed": 0,
        "interactions_removed": 1,
    }
    assert list(load_dataset(tmp_path / "out").user_ids) == ["a", "b"]


def test_lcrec_is_read_a_few_users_at_a_time(tmp_path, monkeypatch):
    config = write_lcrec(tmp_path / "in")
    prepare(config, tmp_path / "whole")
    monkeypatch.setattr("ilrec_dist.data.formats.lcrec.BATCH_USERS", 2)
    # Nothing may parse a whole file.
    monkeypatch.setattr("ilrec_dist.common.files.json.loads", None)
    batches = list(read_lcrec(config).batches(None))
    monkeypatch.undo()
    assert [batch.column("user").unique().to_pylist() for batch in batches] == [["3", "10"], ["4"]]
    monkeypatch.setattr("ilrec_dist.data.formats.lcrec.BATCH_USERS", 1)
    prepare(config, tmp_path / "parts")
    assert (tmp_path / "whole" / "manifest.json").read_bytes() == (
        tmp_path / "parts" / "manifest.json"
    ).read_bytes()


BAD = {
    "malformed JSON": (
        '{"1": [1, 2,\n 3,, 4]}',
        r"Toy\.inter\.json: malformed JSON at line 2, column 4",
    ),
    "not an object": ("[1, 2]", r"Toy\.inter\.json: expected a JSON object at the top, found list"),
    "trailing text": (
        '{"1": [1, 2, 3]}\n]',
        r"Toy\.inter\.json: malformed JSON at line 2, column 1",
    ),
    "not closed": ('{"1": [1, 2, 3]', r"Toy\.inter\.json: malformed JSON at line 1, column 16"),
    "not a list": (
        '{"u7": "x"}',
        r"Toy\.inter\.json: user 1: 'u7' has 'x', expected a list of item ids",
    ),
    "nested item": (
        '{"u7": [1, [2]]}',
        r"Toy\.inter\.json: user 1: 'u7' has \[1, \[2\]\], expected a list",
    ),
    "half a surrogate pair": (
        '{"u7": [1, 2, 3],\n "u\\\\8": ["\\ud83d\\ude00", "\\\\ud83d", "a\\ud83d", 4]}',
        r"Toy\.inter\.json: line 2: \\ud83d after .* is half a surrogate pair",
    ),
    "its other half": (
        '{"u7": ["\\ude00"]}',
        r"Toy\.inter\.json: line 1: \\ude00 after .* is half a surrogate pair",
    ),
    "not UTF-8": (b'{"u\xff": [1, 2, 3]}', r"Toy\.inter\.json: not UTF-8 text \(byte 3\)"),
    "repeated user": (
        '{"u7": [1, 2, 3], "u7": [2]}',
        r"Toy\.inter\.json: the key 'u7' occurs twice",
    ),
    "short user": (
        '{"1": [1, 2, 3], "u8": [1, 2]}',
        r"Toy\.inter\.json: user 'u8' has 2 interactions, expected at least 3",
    ),
    "a large integer": (
        '{"u7": [1], "u8": [18446744073709551615]}',
        r"Toy\.inter\.json: an integer beyond 64 bits; the last key that was read is 'u7'; write",
    ),
    "no user": ('{"": [1, 2, 3]}', r"Toy\.inter\.json: user 1: no user id"),
    "no rows": ("{}", r"Toy\.inter\.json: no interactions"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_bad_lcrec_is_one_clear_line_and_leaves_nothing(tmp_path, text, message):
    config = write_lcrec(tmp_path / "in", text)
    with pytest.raises(UserError, match=message) as raised:
        prepare(config, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "something was left behind"


def test_a_malformed_user_of_lcrec_is_tolerated_and_counted(tmp_path):
    config = write_lcrec(tmp_path / "in", {"1": [1, 2, 3], "2": "x", "3": [3, 2, 1], "4": [None]})
    manifest = prepare(
        unfiltered(format="lcrec", path=config.path, max_bad_rows=2), tmp_path / "out"
    )
    assert manifest["users"] == manifest["read"]["bad_rows"] == 2
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [(row["user"], row["text"]) for row in rejects] == [(2, "'x'"), (4, "[None]")]


def test_an_item_of_lcrec_with_a_field_twice_or_half_a_character_is_refused(tmp_path):
    config = write_lcrec(tmp_path / "in")
    for text, message in (
        (
            '{"1": {"title": "a", "title": "b"}}',
            r"Toy\.item\.json: the key 'title' occurs twice in one object",
        ),
        ('{"1": {"title": "\\ud83dxyz"}}', r"Toy\.item\.json: line 1: .* is half a surrogate pair"),
    ):
        (tmp_path / "in" / "Toy.item.json").write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(config, tmp_path / "out")


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        prepare(unfiltered(format="lcrec", path=str(tmp_path / "nowhere")), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected one file named \*.inter.json .* found none"):
        prepare(unfiltered(format="lcrec", path=str(tmp_path / "empty")), tmp_path / "out")
    for kind in ("csv", "parquet"):
        with pytest.raises(UserError, match="nowhere: no such file"):
            prepare(unfiltered(format=kind, path=str(tmp_path / "nowhere")), tmp_path / "out")


def test_the_previous_folder_survives_a_failed_run(tmp_path):
    prepare(write_lcrec(tmp_path / "in"), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError):
        prepare(write_lcrec(tmp_path / "in", "{"), tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    prepare(write_lcrec(tmp_path / "in", {"1": [1, 2, 3]}), tmp_path / "out")
    assert load_dataset(tmp_path / "out").num_users == 1


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (
        f".out.writing-{dead.pid}",
        f".out.previous-{dead.pid}",
        ".out.writing-1",
        ".outer.writing-7",
    ):
        (tmp_path / name).mkdir()
    prepare(write_lcrec(tmp_path / "in"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.writing-1",
        ".outer.writing-7",
        "in",
        "out",
    ], "others' folders stay"


def test_a_core_that_leaves_too_little_says_so(tmp_path):
    config = write_lcrec(tmp_path / "in")
    with pytest.raises(
        UserError, match=r"k-core \(data.min_user_interactions 9, .*leaves 0 users and 0 items"
    ):
        prepare(
            DataConfig(
                format="lcrec", path=config.path, min_user_interactions=9, min_item_interactions=1
            ),
            tmp_path / "out",
        )


def test_short_users_are_fine_when_the_core_drops_them(tmp_path):
    config = write_lcrec(tmp_path / "in", {"1": [1, 2, 3], "8": [1, 2]})
    prepare(
        DataConfig(
            format="lcrec", path=config.path, min_user_interactions=3, min_item_interactions=1
        ),
        tmp_path / "out",
    )
    assert list(load_dataset(tmp_path / "out").user_ids) == ["1"]


@pytest.mark.parametrize(
    "rows, line, reason",
    [
        ([*GOOD, ("u", 5)], 6, "malformed row: 2 fields, expected 3"),
        ([*GOOD, ("u", 5, 6, 7)], 6, "malformed row: 4 fields, expected 3"),
        # The empty line counts as a line.
        (
            [*GOOD[:2], ("",), *GOOD[2:], ("", 5, 6)],
            7,
            "no user id",
        ),
        ([*GOOD, ("u", "", 6)], 6, "no item id"),
        ([*GOOD, ("u", 5, "soon")], 6, "time 'soon' is not an integer"),
        ([*GOOD, ("u", 5, "")], 6, "time None is not an integer"),
        ([("u", 5, 1.5), *GOOD, ("u", 6, "x")], 7, "time 'x' is not a number"),
        (
            [("u", 5, "2020-01-02"), ("u", 6, "2020-01-02 10:00:00"), ("u", 7, "2020-13-02")],
            4,
            "time '2020-13-02' is not an ISO 8601 date",
        ),
        (
            [("u", 5, "2020-01-02T10:00:00Z"), ("u", 6, "2020-01-02")],
            3,
            "time '2020-01-02' is not an ISO 8601 date-time with a zone",
        ),
    ],
)
def test_bad_csv_rows_are_refused_or_counted(tmp_path, rows, line, reason):
    config = write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(UserError, match=f"rows.csv: line {line}: {reason}"):
        prepare(config, tmp_path / "out")
    rows = [
        *rows,
        *(
            (
                "v",
                item,
                item if "integer" in reason or "id" in reason or "fields" in reason else rows[0][2],
            )
            for item in range(4)
        ),
    ]
    rows += [("u", 11, rows[0][2]), ("u", 12, rows[0][2]), ("u", 13, rows[0][2])]
    config = write_csv(tmp_path / "rows.csv", rows)
    manifest = prepare(unfiltered(format="csv", path=config.path, max_bad_rows=1), tmp_path / "out")
    assert manifest["read"]["bad_rows"] == 1
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert (
        reject["line"] == line
        and reject["reason"].startswith(reason)
        and reject["file"].endswith("rows.csv")
    )
    assert manifest["files"]["rejects.jsonl"]["bytes"] > 0


def test_a_row_that_is_not_utf8_is_a_bad_row(tmp_path):
    config = write_csv(tmp_path / "rows.csv", [*GOOD, ("u", 7, 9)])
    path = tmp_path / "rows.csv"
    path.write_bytes(path.read_bytes().replace(b"u,2,2", b"u\xff,2,2\n,3,3"))
    with pytest.raises(UserError, match="rows.csv: line 4: not UTF-8 text"):
        prepare(config, tmp_path / "out")
    prepare(unfiltered(format="csv", path=config.path, max_bad_rows=2), tmp_path / "out")
    rejects = [
        json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [(row["line"], row["reason"]) for row in rejects] == [
        (4, "not UTF-8 text"),
        (5, "no user id"),
    ], "lines after a dropped row keep their numbers"
    assert load_dataset(tmp_path / "out").num_interactions == 4


def test_damaged_files_are_named(tmp_path):
    text = "user,item,timestamp\n" + "".join(
        f"u{user},{item},{item}\n" for user in range(500) for item in range(4)
    )
    packed = gzip.compress(text.encode())
    path = tmp_path / "rows.csv.gz"
    for content, message in (
        (packed[:5], "cannot be unpacked: Compressed file ended"),
        (text.encode(), "cannot be unpacked: Not a gzipped"),
        (packed[:-900], "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"rows.csv.gz: {message}"):
            prepare(unfiltered(format="csv", path=str(path)), tmp_path / "out")
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"user": [1, 1, 1], "item": [1, 2, 3], "timestamp": [1, 2, 3]}),
        path,
        compression="snappy",
        use_dictionary=False,
    )
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows.parquet: damaged after row 0: "):
        prepare(unfiltered(format="parquet", path=str(path)), tmp_path / "out")


def test_more_bad_rows_than_allowed_are_refused(tmp_path):
    config = write_csv(tmp_path / "rows.csv", [*GOOD, ("u",), ("", 1, 1), *GOOD, ("u", "", 1)])
    with pytest.raises(
        UserError, match=r"rows.csv: line 12: no item id \(bad row 3; data.max_bad_rows allows 2\)"
    ):
        prepare(unfiltered(format="csv", path=config.path, max_bad_rows=2), tmp_path / "out")
    assert (
        prepare(unfiltered(format="csv", path=config.path, max_bad_rows=3), tmp_path / "out")[
            "read"
        ]["bad_rows"]
        == 3
    )


def read_everything(folder):
    """All that a prepared folder holds, through what reads it."""
    dataset = load_dataset(folder)
    ids = [list(dataset.user_ids), list(dataset.item_ids), dataset.item_ids[0]]
    texts = [list(column) for column in (dataset.titles, dataset.texts) if column is not None]
    export_data(folder, "recbole", folder.with_name("exported"), "Toy")
    return ids, texts


@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_one_flipped_byte_of_a_prepared_folder_is_refused_by_name(tmp_path, place):
    config = write_lcrec(tmp_path / "in")
    names = list(prepare(config, tmp_path / "whole")["files"])
    read_everything(tmp_path / "whole")
    assert {"sequences.npy", "offsets.npy", "users.parquet", "items.parquet"} < set(names)
    for name in names:
        folder = tmp_path / name.replace(".", "-")
        shutil.copytree(tmp_path / "whole", folder)
        content = bytearray((folder / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        (folder / name).write_bytes(content)
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
        # The hash is compared before any reader sees the bytes.
        with pytest.raises(UserError, match=rf"{name}: damaged \(its SHA-256"):
            read_everything(folder)


def test_a_prepared_folder_that_is_not_whole_is_refused(tmp_path):
    prepare(write_lcrec(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "out" / "items.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"items.parquet: missing or not of the \d+ bytes"):
        load_dataset(tmp_path / "out")
    with pytest.raises(UserError, match="not a prepared data folder"):
        load_dataset(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [("instruments", 24772, 9922, 206153), ("scientific", 8317, 4344, 58492)],
)
def test_real_data_come_through_whole(tmp_path, name, users, items, interactions):
    folder = shared_data(name)
    manifest = prepare(DataConfig(format="lcrec", path=str(folder)), tmp_path / "out")
    assert (manifest["users"], manifest["items"], manifest["interactions"]) == (
        users,
        items,
        interactions,
    )
    dataset = load_dataset(tmp_path / "out")
    histories = json.loads(next(folder.glob("*.inter.json")).read_text())
    assert histories_of(dataset) == histories
