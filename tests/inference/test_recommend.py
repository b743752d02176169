"""Recommendations for new histories: what
comes out, and what bad input is answered with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference import request_files
from ilrec_dist.inference.inputs import PlainSequences
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.inference.recommend import Recommender, Request
from ilrec_dist.items.trie import Trie
from tests.support.toy_decoder import (
    MAX_HISTORY,
    NUM_ITEMS,
    exhaustive_scores,
    toy_backbone,
    toy_catalogue,
    toy_data,
)

CATALOGUE, DATA = toy_catalogue(), toy_data()
TRIE = Trie(CATALOGUE)
ROWS = {
    "user": ["b", "a", "c"],
    "items": [["i4", "i9"], ["i1", "i2", "i3", "i4", "i5", "i6", "i7", "i8"], ["i9", "i4"]],
}


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelState]:
    yield initialize_parallel(1, "cpu")
    destroy_parallel(process_group=True)


def ranker(parallel: ParallelState, **settings) -> ModelRanker:
    defaults = {
        "beam": 20,
        "batch_size": 64,
        "softmax_scope": "all",
        "inputs": PlainSequences(CATALOGUE, MAX_HISTORY),
    }
    return ModelRanker(toy_backbone(CATALOGUE), TRIE, parallel=parallel, **(defaults | settings))


def run(
    parallel: ParallelState,
    path: Path,
    rows: dict | pa.Table,
    *,
    beam: int = 20,
    part: int = 100,
    **options,
) -> pa.Table:
    """The answer to a request, made in parts of `part` histories."""
    table = rows if isinstance(rows, pa.Table) else pa.table(rows)
    # The file's own pieces are of another size.
    pq.write_table(table, path / "histories.parquet", row_group_size=3)
    request = Request(str(path / "histories.parquet"), **({"top": 5} | options))
    assert request.check_files(DATA) == table.num_rows
    recommender = Recommender(ranker(parallel, beam=beam), DATA, request)
    return pa.concat_tables(
        recommender.table(histories) for _, histories in recommender.histories.parts(part)
    )


def test_the_best_items_in_the_file_s_order(layout: ParallelState, tmp_path: Path) -> None:
    (tmp_path / "allowed.txt").write_text(
        "\n".join(f"i{item}" for item in range(0, NUM_ITEMS, 2)) + "\n\n"
    )
    for exclude_seen, allowed in ((False, None), (True, None), (True, tmp_path / "allowed.txt")):
        table = run(
            layout,
            tmp_path,
            ROWS,
            top=30,
            beam=2,
            exclude_seen=exclude_seen,
            allowed=None if allowed is None else str(allowed),
        ).to_pylist()
        for user, history in zip(ROWS["user"], ROWS["items"], strict=True):
            numbers = np.array([int(item[1:]) for item in history])
            scores = exhaustive_scores(
                toy_backbone(CATALOGUE), CATALOGUE, TRIE, numbers[-MAX_HISTORY:], "all"
            )
            wanted = [
                i
                for i in range(NUM_ITEMS)
                if not (exclude_seen and i in numbers) and not (allowed and i % 2)
            ]
            best = sorted(wanted, key=lambda item: (-round(scores[item], 6), item))[:30]
            mine = [row for row in table if row["user"] == user]
            assert [row["rank"] for row in mine] == list(range(1, len(best) + 1))
            # At most 30 items are left, so the beam holds them all.
            if exclude_seen and allowed:
                assert [row["item"] for row in mine] == [f"i{item}" for item in best]
            assert [row["item"] for row in mine[:3]] == [f"i{item}" for item in best[:3]]
            assert mine[0]["title"] == f"Item number {best[0]}"
            assert mine[0]["score"] == pytest.approx(scores[best[0]], abs=1e-4)
    assert [row["user"] for row in table[:: len(table) // 3]][0] == "b"


def test_users_with_nothing_left_get_no_row(layout: ParallelState, tmp_path: Path) -> None:
    (tmp_path / "allowed.txt").write_text("i4\ni9\n")
    allowed = str(tmp_path / "allowed.txt")
    for part in (1, 100):
        found = run(layout, tmp_path, ROWS, part=part, exclude_seen=True, allowed=allowed)
        assert found.to_pydict()["user"] == ["a"]
    rows = {name: values[::2] for name, values in ROWS.items()}
    assert run(layout, tmp_path, rows, exclude_seen=True, allowed=allowed).num_rows == 0
    assert run(layout, tmp_path, ROWS, allowed=allowed).num_rows == 6


@pytest.mark.parametrize("part", [1, 4, 7, 23])
def test_the_parts_of_a_file_are_answered_as_the_whole(
    layout: ParallelState, tmp_path: Path, part: int
) -> None:
    users = range(DATA.num_users)
    rows = {
        "user": [f"u{user}" for user in users],
        "items": [[f"i{item}" for item in DATA.sequence(user)] for user in users],
    }
    whole, parts = (
        run(layout, tmp_path, rows, part=size, exclude_seen=True) for size in (100, part)
    )
    assert whole.num_rows == 5 * DATA.num_users and parts.drop(["score"]) == whole.drop(["score"])
    np.testing.assert_allclose(parts["score"].to_numpy(), whole["score"].to_numpy(), atol=1e-5)


def test_numbers_as_ids_are_read_as_strings(layout: ParallelState, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 2 \(user '8'\) has the item '77'"):
        run(layout, tmp_path, pa.table({"user": [7, 8], "items": pa.array([["i1"], ["77"]])}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"user": ["a"], "item": [["i1"]]}, r"no column 'items' .* nearest column is 'item'"),
        (
            {"user": ["a", "b"], "items": [["i1"], ["i2", "nope"]]},
            r"row 2 \(user 'b'\) has the item 'nope', which is not among the 60 items",
        ),
        ({"user": ["a", "b"], "items": [["i1"], []]}, r"row 2 \(user 'b'\) has an empty history"),
        (
            {"user": ["a", "b"], "items": pa.array([None, ["i1"]], pa.list_(pa.string()))},
            r"row 1 \(user 'a'\) has an empty history",
        ),
        ({"user": ["a"], "items": ["i1"]}, "column 'items' is string, expected a list of item ids"),
        (
            {"user": pa.array(["a", None]), "items": [["i1"], ["i2"]]},
            r"row 2 has no user \(null or empty in column 'user'\)",
        ),
        ({"user": ["", "b"], "items": [["i1"], ["i2"]]}, "row 1 has no user"),
        (
            {"user": pa.array([7.0, float("nan")]), "items": [["i1"], ["i2"]]},
            "row 2 has no user",
        ),
        (
            {"user": ["a", "b", "a"], "items": [["i1"], ["i2"], ["i3"]]},
            r"row 3 repeats the user 'a' of row 1; expected one history a user",
        ),
        (
            {"user": ["a"], "items": [["i1", None]]},
            r"row 1 \(user 'a'\) has the item None, which is not among",
        ),
        (
            {"user": pa.array([], pa.string()), "items": pa.array([], pa.list_(pa.string()))},
            "no rows",
        ),
    ],
)
def test_bad_histories(
    layout: ParallelState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: dict,
    message: str,
) -> None:
    for checked in (request_files.CHECKED_ROWS, 1):
        monkeypatch.setattr(request_files, "CHECKED_ROWS", checked)
        with pytest.raises(UserError, match=message):
            run(layout, tmp_path, rows)


def test_bad_files_and_flags(layout: ParallelState, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--top 0"):
        run(layout, tmp_path, ROWS, top=0)
    with pytest.raises(UserError, match="missing.txt: no such file"):
        run(layout, tmp_path, ROWS, allowed=str(tmp_path / "missing.txt"))
    (tmp_path / "allowed.txt").write_text("i1\n\nI2\n")
    with pytest.raises(UserError, match="line 3: 'I2' is not among"):
        run(layout, tmp_path, ROWS, allowed=str(tmp_path / "allowed.txt"))
    (tmp_path / "allowed.txt").write_text("\n")
    with pytest.raises(UserError, match="names no item"):
        run(layout, tmp_path, ROWS, allowed=str(tmp_path / "allowed.txt"))
    (tmp_path / "histories.parquet").write_text("user,items\n")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        Request(str(tmp_path / "histories.parquet")).check_files(DATA)
