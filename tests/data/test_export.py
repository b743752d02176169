"""Exports of prepared data, and what their files cannot hold."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.export.interactions import export_data
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.config import ItemsConfig
from tests.support.loading import load


def _toy(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n"
        + "".join(
            f"u{user},{item},{(item * 7 + user) % 5}\n" for user in range(3) for item in range(4)
        )
    )
    (tmp_path / "items.csv").write_text(
        'item,title,text\n0,"A ""quoted"" title","tab\tinside"\n1,Plain,\n'
    )
    config = DataConfig(
        format="csv",
        path=str(tmp_path / "rows.csv"),
        items_path=str(tmp_path / "items.csv"),
        min_user_interactions=1,
        min_item_interactions=1,
    )
    prepare(config, tmp_path / "prepared")
    return load_dataset(tmp_path / "prepared")


@pytest.mark.parametrize("form", ["lcrec", "recbole"])
def test_exports_read_back_as_the_same_interactions(tmp_path, form):
    before = _toy(tmp_path)
    files = export_data(tmp_path / "prepared", form, tmp_path / "exported", "Toy")
    assert files == (
        ["Toy.inter.json", "Toy.item.json"] if form == "lcrec" else ["Toy.inter", "Toy.item"]
    )
    load(tmp_path, form, tmp_path / "exported")
    after = load_dataset(tmp_path / "out")
    assert (after.items == before.items).all() and (after.offsets == before.offsets).all()
    assert list(after.user_ids) == list(before.user_ids) and list(after.item_ids) == list(
        before.item_ids
    )
    assert list(after.titles) == list(before.titles) == ['A "quoted" title', "Plain", "", ""]
    assert after.texts[0] == ("tab\tinside" if form == "lcrec" else "tab inside")
    with pytest.raises(UserError, match="expected one of lcrec, recbole"):
        export_data(tmp_path / "prepared", "csv", tmp_path / "x", "Toy")


def _titled(tmp_path, titles):
    """InteractionDataset data of a user who takes one item of each title, in turn."""
    with open(tmp_path / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([("item", "title"), *enumerate(titles)])
    (tmp_path / "rows.csv").write_text(
        "user,item,timestamp\n" + "".join(f"u,{item},{item}\n" for item in range(len(titles)))
    )
    config = DataConfig(
        format="csv",
        path=str(tmp_path / "rows.csv"),
        items_path=str(tmp_path / "items.csv"),
        min_user_interactions=1,
        min_item_interactions=1,
    )
    prepare(config, tmp_path / "prepared")


def test_a_recbole_export_has_every_item_once_whatever_its_title(tmp_path):
    titles = [f"Cable {item} m" for item in range(5000)]
    titles[3000] = 'Monitor 27" with stand'
    titles[4000] = '"Weird Al" on vinyl'
    titles[4001] = '"Heroes'
    _titled(tmp_path, titles)
    export_data(tmp_path / "prepared", "recbole", tmp_path / "exported", "Shop")
    rows = [
        line.split("\t") for line in (tmp_path / "exported" / "Shop.item").read_text().splitlines()
    ]
    assert [row[0] for row in rows[1:]] == [str(item) for item in range(5000)]
    assert [rows[1 + item][1] for item in (3000, 4000, 4001)] == [
        'Monitor 27" with stand',
        "'Weird Al' on vinyl",
        "'Heroes",
    ]
    with open(tmp_path / "exported" / "Shop.item", newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == rows, "as readers see it that know quotes"


@pytest.mark.parametrize("user", ["a\tb", '"a'])
def test_ids_that_recbole_files_cannot_hold_are_refused(tmp_path, user):
    table = pa.table({"user": [user] * 3, "item": ["x", "y", "z"], "timestamp": [1, 2, 3]})
    pq.write_table(table, tmp_path / "rows.parquet")
    prepare(
        DataConfig(
            format="parquet",
            path=str(tmp_path / "rows.parquet"),
            min_user_interactions=1,
            min_item_interactions=1,
        ),
        tmp_path / "prepared",
    )
    with pytest.raises(UserError, match="RecBole's files cannot hold ids"):
        export_data(tmp_path / "prepared", "recbole", tmp_path / "exported", "Shop")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("ids", [("NA", "x"), ("u", "null"), ("u", "nan"), ("None", "x")])
def test_ids_that_pandas_takes_for_missing_values_are_refused(tmp_path, ids):
    user, item = ids
    pq.write_table(
        pa.table({"user": [user] * 3, "item": [item, "y", "NA-1"], "timestamp": [1, 2, 3]}),
        tmp_path / "rows.parquet",
    )
    prepare(
        DataConfig(
            format="parquet",
            path=str(tmp_path / "rows.parquet"),
            min_user_interactions=1,
            min_item_interactions=1,
        ),
        tmp_path / "prepared",
    )
    what = f"user '{user}'" if item == "x" else f"item '{item}'"
    with pytest.raises(
        UserError,
        match=f"^{what}: pandas, which RecBole reads with, takes this id for a missing value",
    ):
        export_data(tmp_path / "prepared", "recbole", tmp_path / "exported", "Shop")
    assert not (tmp_path / "exported").exists()
    assert export_data(tmp_path / "prepared", "lcrec", tmp_path / "exported", "Shop") == [
        "Shop.inter.json",
        "Shop.item.json",
    ]


def test_lcrec_export_takes_the_index_along(tmp_path):
    _toy(tmp_path)
    build_catalogue(
        ItemsConfig(form="atomic"), load_dataset(tmp_path / "prepared"), tmp_path / "items"
    )
    files = export_data(
        tmp_path / "prepared", "lcrec", tmp_path / "exported", "Toy", tmp_path / "items/index.json"
    )
    assert files == ["Toy.index.json", "Toy.inter.json", "Toy.item.json"]
    assert (
        json.loads((tmp_path / "exported/Toy.index.json").read_text()).keys()
        == json.loads((tmp_path / "exported/Toy.item.json").read_text()).keys()
    )


def test_an_index_of_other_items_is_not_exported(tmp_path):
    dataset = _toy(tmp_path)
    build_catalogue(
        ItemsConfig(form="atomic"),
        replace(dataset, item_ids=["0", "1", "2", "4"]),
        tmp_path / "items",
    )
    with pytest.raises(
        UserError,
        match="items: the index was made for other items than the run's prepared data holds; "
        "run `ilrec index` again",
    ):
        export_data(
            tmp_path / "prepared",
            "lcrec",
            tmp_path / "exported",
            "Toy",
            tmp_path / "items/index.json",
        )
    assert not (tmp_path / "exported").exists()
