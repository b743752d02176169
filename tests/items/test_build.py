"""Indexes read and built, collisions counted, refused and resolved, and the report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.prepare import prepare
from ilrec_dist.items import text_embeddings as embeddings
from ilrec_dist.items import tfidf
from ilrec_dist.items.build import build_catalogue, input_files
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.collisions import (
    collision_report,
    first_collision,
    resolution_preview,
    resolve_collisions,
    tuple_groups,
)
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.index_report import index_summary, report_table
from ilrec_dist.items.residual_quantizer import centroid_codebooks, residual_codes
from ilrec_dist.items.text_embeddings import quantizer_vectors, text_vectors
from ilrec_dist.items.tfidf import fit_terms
from tests.support.item_words import toy, words
from tests.support.shared_data import shared_data


def write_index_file(path, codes):
    path.write_text(json.dumps(codes) if not isinstance(codes, str) else codes)
    return ItemsConfig(index=str(path))


CODES = {
    "0": ["<a_3>", "<b_0>"],
    "10": ["<a_0>", "<b_2>"],
    "20": ["<a_0>", "<b_2>"],
    "30": ["<a_0>", "<b_1>"],
    "unused": ["<a_9>", "<b_9>"],
}


def test_a_given_index_is_read_and_written_back(tmp_path):
    config = write_index_file(tmp_path / "Toy.index.json", CODES)
    report = build_catalogue(config, toy(), tmp_path / "out")
    catalogue = Catalogue.load(tmp_path / "out")
    assert catalogue.items.tolist() == [3, 1, 2, 0] and catalogue.codes().tolist() == [
        [3, 0],
        [0, 2],
        [0, 2],
        [0, 1],
    ]
    assert catalogue.level_sizes == (10, 10), "codes of items without interactions keep their place"
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == {
        item: CODES[item] for item in ("0", "10", "20", "30")
    }
    assert report["collisions"]["before"] == {
        "items": 2,
        "share": 0.5,
        "tuples": 1,
        "excess_items": 1,
        "largest_group": 2,
    }
    assert report["levels"][0] == {
        "name": "a",
        "codes": 10,
        "used": 2,
        "entropy_bits": pytest.approx(0.811278),
        "largest": 3,
    }
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert input_files(config) == [tmp_path / "Toy.index.json"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            {item: CODES[item] for item in ("0", "10", "20")},
            r"Toy\.index\.json: item '30' of the interactions has no code \(1 such",
        ),
        (
            '{"0": ["<a_1>"],\n "10": ["<a_1>"]',
            r"Toy\.index\.json: malformed JSON at line 2, column 17",
        ),
        ({**CODES, "20": ["<a_1>"]}, "item '20' has 1 codes, item '0' has 2"),
        ({**CODES, "20": ["<a_1>", "b2"]}, "item '20': code 'b2' is not of the form <a_128>"),
        (
            {**CODES, "20": ["<b_1>", "<a_2>"]},
            "item '20': code '<b_1>' at level 1, where item '0' has <a_",
        ),
        ({"0": ["<a_1>", "<a_2>"]}, "two levels share a name"),
        ({**CODES, "20": "<a_1>"}, "item '20': expected a list of code tokens"),
        ({}, "holds no items"),
    ],
)
def test_bad_index_files_are_one_clear_line(tmp_path, codes, message):
    with pytest.raises(UserError, match=message) as raised:
        build_catalogue(
            write_index_file(tmp_path / "Toy.index.json", codes), toy(), tmp_path / "out"
        )
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: no such file \(items\.index\)"):
        build_catalogue(ItemsConfig(index=str(tmp_path / "gone.json")), toy(), tmp_path / "out")


def test_refuse_names_both_items_and_the_code(tmp_path):
    write_index_file(tmp_path / "Toy.index.json", CODES)
    with pytest.raises(
        UserError, match=r"Toy\.index\.json: items '10' and '20' share the code <a_0><b_2>"
    ):
        build_catalogue(
            ItemsConfig(index=str(tmp_path / "Toy.index.json"), collisions="refuse"),
            toy(),
            tmp_path / "out",
        )
    distinct = {**CODES, "20": ["<a_0>", "<b_0>"]}
    write_index_file(tmp_path / "Toy.index.json", distinct)
    assert (
        build_catalogue(
            ItemsConfig(index=str(tmp_path / "Toy.index.json"), collisions="refuse"),
            toy(),
            tmp_path / "out",
        )["collisions"]["resolved_by"]
        == "none"
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30),
    st.booleans(),
)
def test_resolved_codes_are_distinct_and_move_as_little_as_they_may(rows, with_vectors):
    codes = np.array(rows, np.int32)
    vectors = (
        np.random.default_rng(len(rows)).normal(size=(len(rows), 3)).astype(np.float32)
        if with_vectors
        else None
    )
    resolution = resolve_collisions(
        codes, [3, 4], vectors, centroid_codebooks(vectors, codes, [3, 4]) if with_vectors else None
    )
    group, sizes = tuple_groups(codes)
    assert collision_report(resolution.codes)["items"] == 0
    if (sizes == 1).all():
        assert resolution.how == "none" and (resolution.codes == codes).all()
    elif max(np.bincount(codes[:, 0])) > 4:
        assert resolution.how == "extra level" and resolution.level_sizes == [
            3,
            4,
            int(sizes.max()),
        ]
        assert (resolution.codes[:, :2] == codes).all()
        for one in range(len(sizes)):
            assert resolution.codes[group == one, 2].tolist() == list(range(sizes[one])), (
                "numbered in item order"
            )
    else:
        assert resolution.how == "last level" and resolution.level_sizes == [3, 4]
        assert (resolution.codes[:, 0] == codes[:, 0]).all(), "all but the last level are kept"
        alone = sizes[group] == 1
        assert (resolution.codes[alone] == codes[alone]).all(), (
            "items that collide with none keep their codes"
        )
        changed = (resolution.codes != codes).any(axis=1)
        for one in np.flatnonzero(sizes > 1):
            assert (~changed[group == one]).sum() == 1 or with_vectors, (
                "one of each group keeps its code"
            )
        assert changed.sum() == resolution.items_changed


def test_repair_moves_the_item_that_another_code_fits_best():
    # Items 0 and 1 share code 0. Item 1 lies next to code 2's centroid, item 0 far from all others.
    vectors = np.array([[0.0], [1.9], [5.0], [2.0]], np.float32)
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 2]], np.int32)
    books = centroid_codebooks(vectors, codes, [2, 3])
    # With this the residuals are the vectors themselves.
    books.levels[0][:] = 0.0
    books.levels[1][:] = [[0.0], [5.0], [2.0]]
    resolution = resolve_collisions(codes, [2, 3], vectors, books)
    assert resolution.codes.tolist() == [[0, 0], [0, 2], [0, 1], [1, 2]]


def test_groups_and_first_collision():
    codes = np.array([[1, 0], [0, 0], [1, 0], [0, 0], [2, 2]])
    group, sizes = tuple_groups(codes)
    assert group.tolist() == [1, 0, 1, 0, 2] and sizes.tolist() == [2, 2, 1]
    assert first_collision(codes) == (0, 2) and first_collision(codes[3:]) is None


def test_built_codes_are_the_same_for_the_same_seed_and_follow_the_texts(tmp_path):
    dataset = toy(240, words(240))
    config = ItemsConfig(levels=3, codes_per_level=16, collisions="resolve", embedding_dim=16)
    report = build_catalogue(config, dataset, tmp_path / "a")
    build_catalogue(config, dataset, tmp_path / "b")
    assert (tmp_path / "a" / "index.json").read_bytes() == (
        tmp_path / "b" / "index.json"
    ).read_bytes()
    codes = Catalogue.load(tmp_path / "a").codes()
    assert collision_report(codes)["items"] == 0 and report["collisions"]["after"]["items"] == 0
    group = np.arange(240) % 8
    same_code = codes[:, 0][:, None] == codes[:, 0][None, :]
    assert (group[:, None] == group[None, :])[same_code].mean() > 0.9, (
        "items of one first code share their group's words"
    )


def test_codes_approximate_their_vectors_better_level_by_level():
    vectors = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    codes, books = residual_codes(vectors, 3, 16, seed=0)
    errors = [
        float((books.residual(vectors, codes, level) ** 2).sum(1).mean()) for level in (0, 1, 2, 3)
    ]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("config", "titles", "message"),
    [
        (
            ItemsConfig(codes_per_level=4),
            None,
            r"none of the 4 items has a title or text \(the first is '0'\)",
        ),
        (ItemsConfig(codes_per_level=4), ["", " ", "", ""], "the titles and texts are blank"),
        (
            ItemsConfig(codes_per_level=4, embedding="cf"),
            None,
            "needs one CF vector for each of the 4 items",
        ),
        (
            ItemsConfig(codes_per_level=3),
            ["oak", "elm", "ash", "fir"],
            "3 is not a power of two.* try 2",
        ),
        (
            ItemsConfig(codes_per_level=8),
            ["oak", "elm", "ash", "fir"],
            "8 codes for 4 items; use at most 4",
        ),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path, config, titles, message):
    with pytest.raises(UserError, match=message):
        build_catalogue(config, toy(titles=titles), tmp_path / "out")


@pytest.mark.parametrize(
    ("embedding", "cf"), [("cf", np.nan), ("text+cf", np.inf), ("text+cf", 1e39)]
)
def test_vectors_that_are_not_finite_are_named(tmp_path, embedding, cf):
    vectors = np.random.default_rng(0).normal(size=(64, 4))
    vectors[7, 2] = cf
    config = ItemsConfig(codes_per_level=8, embedding=embedding, embedding_dim=4)
    with pytest.raises(UserError, match="the CF model: the vector of item '70' is not finite"):
        build_catalogue(config, toy(64, words(64)), tmp_path / "out", vectors)
    index = {str(10 * item): [f"<a_{item // 8}>", f"<b_{item % 4}>"] for item in range(64)}
    given = replace(write_index_file(tmp_path / "x.index.json", index), collisions="resolve")
    with pytest.raises(UserError, match="the CF model: the vector of item '70' is not finite"):
        build_catalogue(given, toy(64), tmp_path / "out", vectors)
    assert not (tmp_path / "out").exists()


def test_a_built_index_with_collisions_is_not_refused_as_a_file(tmp_path):
    config = ItemsConfig(levels=1, codes_per_level=8, embedding_dim=4, collisions="refuse")
    with pytest.raises(UserError, match="the built index: items '0' and .* forbids") as raised:
        build_catalogue(config, toy(64, words(64)), tmp_path / "out")
    assert "file" not in str(raised.value) and "items.codes_per_level" in str(raised.value)


def test_the_summary_says_what_was_left_out_and_what_collides(tmp_path):
    config = write_index_file(tmp_path / "x.index.json", CODES)
    report = build_catalogue(config, toy(), tmp_path / "out")
    assert index_summary(report) == (
        "4 items, 2 levels of 10 codes; 1 items of items.index passed over, which the data set "
        "does not have; 2 items (50.0%) share all their tokens; "
        "items.collisions=resolve would give about 1 of them other last codes"
    )
    assert report["warning"].startswith("50.0% of the items share all their tokens")
    assert "items.collisions=resolve" in report["warning"]
    assert f"warning: {report['warning']}" in report_table(report)
    resolved = build_catalogue(replace(config, collisions="resolve"), toy(), tmp_path / "other")
    assert "0 items (0.0%) share" in index_summary(resolved) and resolved["warning"] is None
    assert "(2, 50.0%, before 1 last codes were reassigned)" in index_summary(resolved)
    texts = [*words(62), "", " "]
    built = ItemsConfig(levels=2, codes_per_level=8, embedding_dim=4)
    report = build_catalogue(built, toy(64, texts), tmp_path / "built")
    share = report["collisions"]["after"]["share"]
    assert "; 2 items without title and text; " in index_summary(report)
    assert (report["warning"] is not None) == (share > 0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_preview_of_a_resolution_is_what_it_does(rows):
    codes = np.array(rows, np.int32)
    preview = resolution_preview(codes, [3, 4])
    resolution = resolve_collisions(codes, [3, 4], None, None)
    assert preview["how"] == resolution.how
    if preview["how"] == "last level":
        assert preview["items"] == resolution.items_changed
    if preview["how"] == "extra level":
        assert preview["codes"] == resolution.level_sizes[-1]


def one_word(item):
    return "guitar"


def chinese(item):
    return (
        "".join("弦琴弓木蓝包"[(item // 6**place) % 6] for place in range(3))
        + "吉他架箱"[item % 4] * 3
    )


def half_chinese(item):
    return chinese(item) if item % 2 else f"blue guitar {item % 5}x"


def part_numbers(item):
    return f"{('KAB', 'XCD', 'QEF')[item % 3]}{item * 7919 % 1000:04}"


@pytest.mark.parametrize(
    ("title", "kinds"), [(one_word, 1), (chinese, 4), (half_chinese, 2), (part_numbers, 3)]
)
def test_titles_whose_words_say_little(tmp_path, title, kinds):
    titles = [title(item) for item in range(60)]
    vectors, new = text_vectors(titles, 16, 0, tmp_path, titles[:5])
    assert (
        np.isfinite(vectors).all()
        and (np.linalg.norm(vectors, axis=1) > 0.99).all()
        and np.allclose(new, vectors[:5], atol=1e-5)
    )
    likeness, kind = vectors @ vectors.T, np.arange(60) % kinds
    same = kind[:, None] == kind
    assert likeness[same].mean() > 0.3 + (likeness[~same].mean() if kinds > 1 else 0.0), (
        "items of one kind are alike"
    )
    report = build_catalogue(
        ItemsConfig(levels=2, codes_per_level=8, collisions="resolve"),
        toy(60, titles),
        tmp_path / "out",
    )
    assert report["collisions"]["after"]["items"] == 0


def test_characters_are_taken_only_where_words_say_little():
    for titles in (
        words(90),
        [*words(90), *map(chinese, range(20))],
        [*words(90), *[""] * 900],
        [*words(90), *map(part_numbers, range(20))],
    ):
        vectorizer, terms = fit_terms(lambda titles=titles: iter(titles), 2)
        expected = TfidfVectorizer(
            sublinear_tf=True, stop_words="english", max_features=50_000, min_df=2, dtype=np.float32
        ).fit_transform(titles)
        assert (
            vectorizer.analyzer == "word"
            and terms.shape == expected.shape
            and (terms != expected).nnz == 0
        )
    for titles in (
        [*words(60), *map(chinese, range(30))],
        [*words(60), *map(part_numbers, range(30))],
        ["the", "of", "of", "a"],
    ):
        assert fit_terms(lambda titles=titles: iter(titles), 2)[0].analyzer == "char_wb"


def test_the_work_for_characters_is_bounded(tmp_path, monkeypatch):
    """Every third text is fitted, by its beginning; all items get vectors near their
    kind.
    """
    monkeypatch.setattr(tfidf, "FIT_CHARACTERS", 25)
    titles = [chinese(item) + "尾" * 200 + str(item) for item in range(60)]
    vectorizer, terms = fit_terms(lambda: iter(titles), 2)
    assert terms.shape[0] == 20 and not any(
        "尾9" in term for term in vectorizer.get_feature_names_out()
    )
    vectors, new = text_vectors(titles, 16, 0, tmp_path, titles[:5])
    assert vectors.shape == (60, 16) and np.allclose(new, vectors[:5], atol=1e-5)
    likeness, kind = vectors @ vectors.T, np.arange(60) % 4
    assert likeness[kind[:, None] == kind].mean() > likeness[kind[:, None] != kind].mean() + 0.05


def test_cf_vectors_and_both_side_by_side(tmp_path):
    dataset, vectors = toy(64, words(64)), np.random.default_rng(0).normal(size=(64, 8))
    build_catalogue(
        ItemsConfig(codes_per_level=8, embedding="cf"), dataset, tmp_path / "cf", vectors
    )
    build_catalogue(
        ItemsConfig(codes_per_level=8, embedding="text+cf", embedding_dim=8),
        dataset,
        tmp_path / "both",
        vectors,
    )
    assert (
        Catalogue.load(tmp_path / "cf").codes() != Catalogue.load(tmp_path / "both").codes()
    ).any()


def test_vectors_made_block_by_block_are_those_made_at_once(tmp_path, monkeypatch):
    dataset = toy(90, words(90))
    cf = np.random.default_rng(1).standard_normal((90, 6)).astype(np.float32) * 5
    config = ItemsConfig(embedding="text+cf", embedding_dim=8)
    at_once = quantizer_vectors(config, dataset, cf, tmp_path)
    assert at_once.shape == (90, 14) and list(tmp_path.iterdir()) == []
    text, joint_cf = at_once[:, :8], at_once[:, 8:]
    np.testing.assert_allclose(joint_cf, cf / np.sqrt((cf**2).sum(1).mean()), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1.0, rtol=1e-5)
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 16)
    np.testing.assert_allclose(quantizer_vectors(config, dataset, cf, tmp_path), at_once, rtol=1e-5)
    # A sample gives another space, in which the same items are alike.
    monkeypatch.setattr(tfidf, "FIT_DOCUMENTS", 80)
    found = quantizer_vectors(replace(config, embedding="text"), dataset, None, tmp_path)
    assert np.array_equal(
        found, quantizer_vectors(replace(config, embedding="text"), dataset, None, tmp_path)
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    likeness, expected = (vectors @ vectors.T for vectors in (found, text))
    assert np.corrcoef(likeness.ravel(), expected.ravel())[0, 1] > 0.9


def test_atomic_ids_are_one_token_an_item(tmp_path):
    build_catalogue(ItemsConfig(form="atomic"), toy(), tmp_path / "out")
    catalogue = Catalogue.load(tmp_path / "out")
    assert (
        catalogue.item_tokens(np.arange(4)).tolist() == [[1], [2], [3], [4]]
        and catalogue.token_names()[1] == "<item_0>"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "name", "colliding", "largest"),
    [
        ("instruments", "Instruments", 48, 3),
        ("scientific", "Scientific", 54, 2),
        ("scientific", "Scientific.rqvae", 887, 22),
    ],
)
def test_published_indexes_and_their_repair(tmp_path, folder, name, colliding, largest):
    data = shared_data(folder)
    prepare(DataConfig(format="lcrec", path=str(data)), tmp_path / "data")
    dataset = load_dataset(tmp_path / "data")
    index = str(data / f"{name}.index.json")
    kept = build_catalogue(ItemsConfig(index=index), dataset, tmp_path / "kept")["collisions"]
    assert (kept["before"]["items"], kept["before"]["largest_group"]) == (
        colliding,
        largest,
    ) and kept["after"] == kept["before"]
    report = build_catalogue(
        ItemsConfig(index=index, collisions="resolve"), dataset, tmp_path / "repaired"
    )["collisions"]
    assert report["resolved_by"] == "last level" and report["after"]["items"] == 0
    before, after = (
        Catalogue.load(tmp_path / "kept").codes(),
        Catalogue.load(tmp_path / "repaired").codes(),
    )
    assert (before[:, :3] == after[:, :3]).all() and report["items_changed"] == (
        before != after
    ).any(axis=1).sum() < 1.02 * kept["before"]["excess_items"] + 1
