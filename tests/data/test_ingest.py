"""Sorting, repeats and the k-core against plain Python on random interactions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.ingest.encoder import PART_IDS, PARTS, Encoder
from ilrec_dist.data.ingest.spill import Spill, k_core, sort_rows

ROWS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=60
)


def _spill(folder, rows, timed=True):
    spill = Spill(folder, timed)
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    spill.append((columns[0], columns[1], columns[2] if timed else None))
    return spill


def _read(spill):
    user, item, time = spill.read(0, spill.rows)
    return list(
        zip(
            user.tolist(),
            item.tolist(),
            *([time.tolist()] if time is not None else []),
            strict=True,
        )
    )


def brute_force_core(rows, min_user, min_item):
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= min_user and items[row[1]] >= min_item]
        if len(kept) == len(rows):
            return set(users), set(items), len(kept)
        rows = kept


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(1, 4), st.sampled_from([3, 7, 1000]))
def test_k_core_is_the_fixed_point_of_brute_force(
    tmp_path_factory, rows, min_user, min_item, chunk
):
    rows = sorted(rows, key=lambda row: row[0])
    spill = _spill(tmp_path_factory.mktemp("core") / "rows", rows)
    core = k_core(spill, 7, 7, min_user, min_item, chunk)
    users, items, kept = brute_force_core(rows, min_user, min_item)
    assert (set(np.flatnonzero(core.users)), set(np.flatnonzero(core.items)), core.rows) == (
        users,
        items,
        kept,
    )


@settings(max_examples=60, deadline=None)
@given(
    ROWS,
    st.booleans(),
    st.sampled_from([2, 5, 1000]),
    st.permutations(range(7)),
    st.sampled_from([1, 1 << 61]),
)
def test_rows_are_sorted_by_user_then_time_then_file_order_without_exact_repeats(
    tmp_path_factory, rows, timed, chunk, rank, spread
):
    rows = [(user, item, (time - 1) * spread) for user, item, time in rows]
    folder = tmp_path_factory.mktemp("sort")
    out = Spill(folder / "out", timed)
    rank = np.array(rank, np.int32)
    dropped = sort_rows(
        _spill(folder / "in", rows, timed), out, rank, np.arange(7, dtype=np.int32), chunk
    )
    expected = [(rank[user], item, time) for user, item, time in rows]
    if timed:
        # The first of equal rows keeps its place in the result and in the reference.
        expected = sorted(dict.fromkeys(expected), key=lambda row: (row[0], row[2]))
    else:
        expected = [row[:2] for row in sorted(expected, key=lambda row: row[0])]
    assert _read(out) == expected
    assert dropped == len(rows) - len(expected)
    assert sorted(path.name for path in (folder / "out").iterdir()) == (
        ["item", "time", "user"] if timed else ["item", "user"]
    ), "parts left behind"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text("ab01é", min_size=1, max_size=20), max_size=8), max_size=5))
def test_encoder_gives_each_id_one_code_and_ranks_them(batches):
    encoder = Encoder()
    codes = [
        code for batch in batches for code in encoder.encode(pa.array(batch, pa.string())).tolist()
    ]
    flat = [value for batch in batches for value in batch]
    distinct = list(dict.fromkeys(flat))
    assert (
        len(set(zip(codes, flat, strict=True))) == len(set(codes)) == len(distinct) == len(encoder)
    )
    ranks, ids = encoder.ranks()
    plain = all(value == "0" or (value.isdigit() and value[0] != "0") for value in distinct)
    assert ids.to_pylist() == sorted(distinct, key=int if plain and distinct else str)
    assert [ids[int(ranks[code])].as_py() for code in codes] == flat


def test_integer_ids_are_ordered_by_value():
    encoder = Encoder()
    codes = encoder.encode(pa.array([10, -9, 100, 10], pa.int64()))
    ranks, ids = encoder.ranks()
    assert ranks[codes].tolist() == [1, 0, 2, 1] and ids.to_pylist() == ["-9", "10", "100"]


def test_integers_of_any_length_are_ordered_by_value():
    ids = ["1742342342342342342", "987654321098765432", "25", "98765432109876543210"]
    encoder = Encoder()
    encoder.encode(pa.array(ids))
    assert encoder.ranks()[1].to_pylist() == sorted(ids, key=int)


@pytest.mark.parametrize(
    "pattern", ["user{:07}@mail.example.com", "https://shop.example.com/{:06}", "{}", "B{:09}X"]
)
def test_ids_that_begin_or_end_alike_share_out_evenly(pattern):
    ids = [pattern.format(number) for number in range(0, 25_600, 2)]
    encoder = Encoder()
    codes = encoder.encode(pa.array(ids))
    sizes = [0 if part is None else len(part) for part in encoder.parts]
    assert 15 < min(sizes) and max(sizes) < 150, "50 to a part, within what chance allows"
    assert (encoder.encode(pa.array(["x", *ids[:100], "yy"]).slice(1, 100)) == codes[:100]).all(), (
        "whatever stands beside an id, its code stays"
    )


def test_more_ids_than_codes_are_an_error(monkeypatch):
    monkeypatch.setattr("ilrec_dist.data.ingest.encoder.PART_IDS", 2)
    encoder = Encoder()
    encoder.encode(pa.array(["user1", "user2", "user1"]))
    with pytest.raises(
        UserError, match=r"distinct users or items, and 512 is the most that can be numbered"
    ):
        for start in range(0, 1000, 100):
            encoder.encode(pa.array([f"user{number}" for number in range(start, start + 100)]))
    assert (PART_IDS - 1) * PARTS + PARTS - 1 == np.iinfo(np.int32).max, (
        "the last code that is given is the last int32"
    )
