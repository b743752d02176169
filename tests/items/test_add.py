"""New items get codes of their own and old ones keep theirs; the report as table and
picture.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.add import GivenVectors, add_items
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import Catalogue, catalogue_hash
from ilrec_dist.items.collisions import collision_report
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.index_plot import plot_code_use
from ilrec_dist.items.index_report import open_index, report_table
from tests.support.item_words import words


def built(tmp_path, n=96, **settings):
    dataset = InteractionDataset(
        np.arange(3, dtype=np.int32),
        np.array([0, 3]),
        ["u"],
        [f"i{item}" for item in range(n)],
        words(n),
    )
    build_catalogue(
        ItemsConfig(
            **{
                "levels": 2,
                "codes_per_level": 16,
                "collisions": "resolve",
                "embedding_dim": 16,
                **settings,
            }
        ),
        dataset,
        tmp_path / "old",
    )
    return dataset


def test_old_codes_stay_and_new_ones_are_distinct_and_fitting(tmp_path):
    dataset = built(tmp_path)
    old = Catalogue.load(tmp_path / "old")
    # words(104) begins with the groups of words(96): item i belongs to group i % 8.
    texts = words(104, seed=0)[96:]
    report = add_items(
        tmp_path / "old", dataset, [f"n{item}" for item in range(8)], tmp_path / "new", texts
    )
    new = Catalogue.load(tmp_path / "new")
    assert report["added"] == 8 and new.num_items == 104 and new.level_sizes == old.level_sizes
    assert (new.codes()[:96] == old.codes()).all() and collision_report(new.codes())[
        "items"
    ] == 0 == report["collisions"]["after"]["items"]
    index = json.loads((tmp_path / "new" / "index.json").read_text())
    assert list(index)[-8:] == [f"n{item}" for item in range(8)] and list(index)[:96] == list(
        dataset.item_ids
    )
    fitting = [(new.codes()[96 + item, 0] == new.codes()[item:96:8, 0]).any() for item in range(8)]
    assert np.mean(fitting) > 0.8, "a new item shares its first code with old items of its group"


def test_a_full_prefix_a_known_id_and_missing_texts_are_errors(tmp_path):
    dataset = built(tmp_path, levels=1, codes_per_level=16, n=16)
    with pytest.raises(
        UserError,
        match=r"index add: item 'new': the prefix the whole catalogue has no code left at its "
        r"last level \(16 codes, 1 new",
    ):
        add_items(tmp_path / "old", dataset, ["new"], tmp_path / "new", ["group1 shared1"])
    with pytest.raises(UserError, match="item 'i3' is in .*index.json already"):
        add_items(tmp_path / "old", dataset, ["i3"], tmp_path / "new", ["x"])
    with pytest.raises(UserError, match="needs titles or texts of the old and the new items"):
        add_items(tmp_path / "old", dataset, ["new"], tmp_path / "new")
    with pytest.raises(UserError, match="1 and 2 vectors for 16 old and 1 new items"):
        add_items(
            tmp_path / "old",
            dataset,
            ["new"],
            tmp_path / "new",
            vectors=GivenVectors(np.zeros((2, 2)), np.zeros((1, 2))),
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "ids",
    [
        [f"j{item}" for item in range(12)],
        [f"i{item}" for item in range(11)],
        [f"i{item}" for item in range(13)],
    ],
)
def test_an_index_of_other_items_is_refused(tmp_path, ids):
    dataset = built(tmp_path, n=12, form="atomic")
    with pytest.raises(
        UserError,
        match=r"old: the index was made for other items than the run's prepared data holds; "
        "run `ilrec index` again",
    ):
        add_items(tmp_path / "old", replace(dataset, item_ids=ids), ["x"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: json.dumps(json.loads(text) | {"i0": ["<a_1>"]}),
        lambda text: text[:-9],
        lambda text: text.replace("i3", "i\xa03", 1),
        lambda _: "{}",
        lambda _: "[",
    ],
)
def test_an_index_file_that_was_changed_is_refused_with_advice(tmp_path, change):
    dataset, file = built(tmp_path, n=16), tmp_path / "old/index.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match="index.json: damaged .*; remove the folder and run") as one:
        add_items(tmp_path / "old", dataset, ["x"], tmp_path / "new", ["group1"])
    assert str(one.value).startswith(f"{file}: ")


def test_where_an_item_is_one_token_new_ones_are_appended(tmp_path):
    dataset = built(tmp_path, n=12, form="atomic")
    add_items(tmp_path / "old", dataset, ["x", "y"], tmp_path / "new")
    old, new = Catalogue.load(tmp_path / "old"), Catalogue.load(tmp_path / "new")
    assert new.level_sizes == (14,) and new.item_tokens(np.arange(14)).ravel().tolist() == list(
        range(1, 15)
    )
    assert (new.item_tokens(np.arange(12)) == old.item_tokens(np.arange(12))).all()
    index = json.loads((tmp_path / "new" / "index.json").read_text())
    assert list(index.items())[-2:] == [("x", ["<item_12>"]), ("y", ["<item_13>"])]
    # By this hash a model refuses codes that it was not trained with.
    assert catalogue_hash(new) != catalogue_hash(old)
    more = InteractionDataset(dataset.items, dataset.offsets, ["u"], [*dataset.item_ids, "x", "y"])
    build_catalogue(
        ItemsConfig(index=str(tmp_path / "new" / "index.json")), more, tmp_path / "given"
    )
    add_items(tmp_path / "given", more, ["z"], tmp_path / "newer")
    assert Catalogue.load(tmp_path / "newer").codes().ravel().tolist() == list(range(15))


def test_a_crowd_for_one_prefix_shares_its_free_codes(tmp_path):
    vectors = (
        np.repeat(np.eye(4, dtype=np.float32), 2, axis=0)
        + np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * 0.01
    )
    dataset = InteractionDataset(
        np.arange(3, dtype=np.int32), np.array([0, 3]), ["u"], [str(item) for item in range(8)]
    )
    build_catalogue(
        ItemsConfig(levels=2, codes_per_level=4, collisions="resolve", embedding="cf"),
        dataset,
        tmp_path / "old",
        vectors,
    )
    new = np.tile(vectors[:1], (2, 1))
    add_items(
        tmp_path / "old", dataset, ["a", "b"], tmp_path / "new", vectors=GivenVectors(new, vectors)
    )
    codes = Catalogue.load(tmp_path / "new").codes()
    assert codes[8, 0] == codes[9, 0] == codes[0, 0] and collision_report(codes)["items"] == 0
    with pytest.raises(UserError, match="no code left"):
        add_items(
            tmp_path / "new",
            InteractionDataset(
                np.zeros(1, np.int32), np.array([0, 1]), ["u"], [*dataset.item_ids, "a", "b"]
            ),
            ["c"],
            tmp_path / "more",
            vectors=GivenVectors(new[:1], np.vstack([vectors, new])),
        )


def clustered(n: int = 240, dim: int = 8) -> np.ndarray:
    random = np.random.default_rng(3)
    centres = random.normal(size=(16, dim)) * 3
    return (centres[np.arange(n) * 7 % 16] + random.normal(size=(n, dim))).astype(np.float32)


def test_twins_of_old_items_get_their_first_codes_and_vectors_in_code_order_are_refused(tmp_path):
    vectors = clustered()
    dataset = built_from(vectors, tmp_path, embedding="cf")
    old = Catalogue.load(tmp_path / "old")
    twins = np.random.default_rng(1).choice(240, 30, replace=False)
    ids = [f"n{item}" for item in range(30)]
    for name, given in (
        ("own", GivenVectors(vectors[twins])),
        ("both", GivenVectors(vectors[twins], vectors)),
    ):
        add_items(tmp_path / "old", dataset, ids, tmp_path / name, vectors=given)
        codes = Catalogue.load(tmp_path / name).codes()
        agreement = (codes[240:, 0] == old.codes()[twins, 0]).mean()
        assert agreement == 1.0 if name == "own" else agreement > 0.9
        assert (codes[:240] == old.codes()).all()
    in_code_order = vectors[old.items]
    with pytest.raises(UserError, match="do not fit the codes of .*old: they are in code order"):
        add_items(
            tmp_path / "old",
            dataset,
            ids,
            tmp_path / "new",
            vectors=GivenVectors(vectors[twins], in_code_order),
        )
    others = vectors[np.random.default_rng(2).permutation(240)]
    with pytest.raises(UserError, match="items of one first code are no more alike than others"):
        add_items(
            tmp_path / "old",
            dataset,
            ids,
            tmp_path / "new",
            vectors=GivenVectors(vectors[twins], others),
        )
    with pytest.raises(UserError, match="vectors have 7 dimensions, those that .* have 8"):
        add_items(
            tmp_path / "old",
            dataset,
            ids,
            tmp_path / "new",
            vectors=GivenVectors(vectors[twins, :7]),
        )
    with pytest.raises(UserError, match="29 vectors for 30 new items"):
        add_items(
            tmp_path / "old", dataset, ids, tmp_path / "new", vectors=GivenVectors(vectors[:29])
        )
    assert not (tmp_path / "new").exists()


def built_from(vectors, tmp_path, **settings) -> InteractionDataset:
    dataset = InteractionDataset(
        np.arange(3, dtype=np.int32),
        np.array([0, 3]),
        ["u"],
        [f"i{item}" for item in range(len(vectors))],
    )
    config = ItemsConfig(levels=3, codes_per_level=16, **settings)
    build_catalogue(config, dataset, tmp_path / "old", vectors)
    return dataset


def test_new_vectors_alone_need_an_index_that_was_built_from_their_kind(tmp_path):
    vectors = clustered()
    dataset = built_from(vectors, tmp_path, embedding="cf")
    given = ItemsConfig(index=str(tmp_path / "old/index.json"))
    build_catalogue(given, dataset, tmp_path / "given")
    with pytest.raises(
        UserError, match=r"given were given, not built from vectors; .*--vectors OLD.npy NEW.npy"
    ):
        add_items(
            tmp_path / "given", dataset, ["n"], tmp_path / "new", vectors=GivenVectors(vectors[:1])
        )
    add_items(
        tmp_path / "given",
        dataset,
        ["n"],
        tmp_path / "new",
        vectors=GivenVectors(vectors[:1], vectors),
    )
    first = Catalogue.load(tmp_path / "new").codes()[[0, 240], 0]
    assert first[0] == first[1]


def test_a_text_twin_gets_its_twins_first_codes(tmp_path):
    texts = words(160)
    dataset = InteractionDataset(
        np.arange(3, dtype=np.int32),
        np.array([0, 3]),
        ["u"],
        [f"i{item}" for item in range(160)],
        texts,
    )
    config = ItemsConfig(levels=3, codes_per_level=16, embedding_dim=16)
    build_catalogue(config, dataset, tmp_path / "old")
    ids = [f"n{item}" for item in range(30)]
    add_items(tmp_path / "old", dataset, ids, tmp_path / "new", [f"{t} " for t in texts[:30]])
    codes = Catalogue.load(tmp_path / "new").codes()
    assert (codes[160:, :2] == codes[:30, :2]).all()
    report = add_items(tmp_path / "old", dataset, ["x", "y"], tmp_path / "blank", [texts[0], " "])
    assert "warning: 1 of them have neither title nor text" in report_table(report)


def test_report_as_table_and_picture(tmp_path):
    built(tmp_path)
    report, catalogue = open_index(tmp_path / "old")
    table = report_table(report)
    assert (
        "96 items, 33 tokens" in table and "collisions after" in table and "rule resolve" in table
    )
    plot_code_use(catalogue, tmp_path / "use.svg")
    picture = ElementTree.parse(tmp_path / "use.svg").getroot()
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 2
