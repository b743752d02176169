"""Every export is read back to the same interactions, whatever the ids and times."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.export.interactions import export_data

pytestmark = pytest.mark.slow

IDS = st.one_of(
    st.integers(0, 10**25).map(str),
    st.integers(0, 30).map(lambda number: f"00{number}"),
    st.sampled_from(["9" * 5000, "1" * 5000, str(2**63), str(2**63 - 1), "-7", "1e5", "0x1", "٣"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from(
        ["a b", "a\u2028b", "é", "e\u0301", "'", 'a"b', "{}", "\\", "\ufeff", "x\x00y"]
    ),
).filter(lambda text: text.strip() != "")
TIMES = st.integers(-(2**63), 2**63 - 1)


def write_rows(path: Path, users: list[str], items: list[str], times: list[int] | None) -> None:
    columns: dict[str, Any] = {"user": users, "item": items}
    if times is not None:
        columns["timestamp"] = pa.array(times, pa.int64())
    pq.write_table(pa.table(columns), path)


def same_interactions(folder: Path, other: Path, timed: bool) -> None:
    before, after = load_dataset(folder), load_dataset(other)
    assert list(after.user_ids) == list(before.user_ids)
    assert list(after.item_ids) == list(before.item_ids)
    assert np.array_equal(after.items, before.items)
    assert np.array_equal(after.offsets, before.offsets)
    if timed:
        tables = [pq.read_table(path / "interactions.parquet") for path in (folder, other)]
        assert tables[0].column("timestamp").equals(tables[1].column("timestamp"))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("form", ["lcrec", "recbole"])
def test_an_export_is_read_back_to_the_same_interactions(form, data):
    ids = st.lists(IDS, min_size=3, max_size=6, unique_by=lambda text: text.strip())
    users, items = data.draw(ids), data.draw(ids)
    rows = [(user, item) for user in users for item in items[: data.draw(st.integers(3, 6))]]
    times = data.draw(st.none() | st.lists(TIMES, min_size=len(rows), max_size=len(rows)))
    timed = times is not None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work / "rows.parquet", *map(list, zip(*rows, strict=True)), times)
        common = {"min_user_interactions": 1, "min_item_interactions": 1}
        column = "timestamp" if timed else None
        config = DataConfig("parquet", str(work / "rows.parquet"), time_column=column, **common)
        prepare(config, work / "prepared")
        try:
            export_data(work / "prepared", form, work / "Shop", "Shop")
        except UserError as error:
            # RecBole's files have no quoting, and pandas loses some ids: such are refused.
            assert form == "recbole" and "RecBole" in str(error)
            return
        prepare(DataConfig(form, str(work / "Shop"), **common), work / "back")
        same_interactions(work / "prepared", work / "back", timed and form == "recbole")


@pytest.mark.parametrize("seed", range(4))
def test_a_chronological_export_is_read_back_to_the_same_split(tmp_path, seed):
    rng = np.random.default_rng(seed)
    rows, users, items = 2000, 12, 40
    write_rows(
        tmp_path / "rows.parquet",
        [f"u{user}" for user in rng.integers(0, users, rows)],
        [str(item) for item in rng.integers(0, items, rows)],
        rng.integers(0, 500, rows).tolist(),
    )
    common: dict[str, Any] = {"min_user_interactions": 1, "min_item_interactions": 1}
    common["split"] = "chronological"
    config = DataConfig("parquet", str(tmp_path / "rows.parquet"), **common)
    manifest = prepare(config, tmp_path / "prepared")
    files = export_data(tmp_path / "prepared", "recbole", tmp_path / "Shop", "Shop")
    assert files == [
        *("Shop.inter", "Shop.item"),
        *("Shop.test.inter", "Shop.train.inter", "Shop.valid.inter"),
    ]
    cuts = [str(manifest["split"][name]) for name in ("validation_from", "test_from")]
    back = DataConfig("recbole", str(tmp_path / "Shop"), split_dates=cuts, **common)
    prepare(back, tmp_path / "back")
    same_interactions(tmp_path / "prepared", tmp_path / "back", timed=True)
    positions = [load_dataset(tmp_path / name).split_positions for name in ("prepared", "back")]
    assert np.array_equal(*positions)
