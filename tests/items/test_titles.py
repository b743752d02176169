"""Items as titles: spelling, the end token, refusals, and new items."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import ConfigError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.add import add_items
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.index_plot import plot_code_use
from ilrec_dist.items.index_report import report_table
from ilrec_dist.items.language_model import LanguageModel
from ilrec_dist.items.titles import TOKENIZER, load_tokenizer
from ilrec_dist.items.trie import Trie
from ilrec_dist.items.vocabulary import NO_TOKEN
from tests.support import language_models

TITLES = [
    "Steel guitar strings",
    "Steel guitar strings, light",
    "Guitar  stand",
    "Köln <end> drum ⟨♫⟩",
    "Guitar stand",
    "Violin rosin, dark, for the winter months and cold halls",
]
CONFIG = ItemsConfig(form="titles", title_vocab_size=512)
# Token ids of a vocabulary of its own: padding 0, the end, and the tokenizer's token 0.
PADDING, END, FIRST = 0, 1, 2


def data(titles: list[str] | None = TITLES) -> InteractionDataset:
    count = len(TITLES)
    return InteractionDataset(
        np.arange(count, dtype=np.int32),
        np.array([0, count]),
        ["u"],
        [f"i{item}" for item in range(count)],
        titles,
    )


def spelt(catalogue: Catalogue, folder: Path, item: int) -> str:
    tokens = catalogue.item_tokens(np.array(item))
    assert tokens[catalogue.item_lengths(np.array(item)) - 1] == END
    return (
        load_tokenizer(folder / TOKENIZER, "the test")
        .decode([token - FIRST for token in tokens.tolist() if token >= FIRST])
        .strip()
    )


def test_every_title_is_spelt_and_closed(tmp_path):
    report = build_catalogue(CONFIG, data(), tmp_path / "items")
    catalogue = Catalogue.load(tmp_path / "items")
    for item, title in enumerate(TITLES):
        tokens = catalogue.item_tokens(np.array(item)).tolist()
        assert (
            tokens.count(END) == 1
            and set(tokens[tokens.index(END) + 1 :]) <= {NO_TOKEN}
            and min(tokens[: tokens.index(END)]) >= FIRST
        )
        assert catalogue.item_lengths(np.array([item])).tolist() == [tokens.index(END) + 1]
        assert spelt(catalogue, tmp_path / "items", item) == " ".join(title.split())
    assert (
        catalogue.item_lengths(np.arange(6)).max() == catalogue.depth
        and catalogue.used_tokens().min() > PADDING
        and END in catalogue.used_tokens()
    )
    # The titles have two spaces or one.
    assert report["collisions"]["after"] == {
        "items": 2,
        "share": 1 / 3,
        "tuples": 1,
        "excess_items": 1,
        "largest_group": 2,
    }
    assert "2 items (33.33%) share 1 tuples" in report_table(report)
    assert report["levels"][0]["largest"] <= 6 and report["levels"][-1]["largest"] == 1, (
        "titles that have ended are in no level behind"
    )
    plot_code_use(catalogue, tmp_path / "plot.svg")
    names = json.loads((tmp_path / "items/index.json").read_text())
    assert [len(names[f"i{item}"]) for item in range(6)] == catalogue.item_lengths(
        np.arange(6)
    ).tolist() and names["i2"] == names["i4"]
    assert names["i0"][-1] == "<end>" and catalogue.token_names()[END] == "<end>"


def test_a_prefix_leads_to_the_titles_that_go_on_with_it(tmp_path):
    build_catalogue(CONFIG, data(), tmp_path / "items")
    catalogue = Catalogue.load(tmp_path / "items")
    trie = Trie.load(tmp_path / "items", catalogue)
    own = [tuple(tokens[tokens != NO_TOKEN]) for tokens in catalogue.item_tokens(np.arange(6))]
    for item, tokens in enumerate(own):
        for depth in range(len(tokens)):
            _, children, _ = trie.children(depth, trie.item_node(depth, np.array([item])))
            assert children.tolist() == sorted(
                {other[depth] for other in own if other[:depth] == tokens[:depth]}
            )


def test_the_same_titles_give_the_same_tokens(tmp_path):
    for name in ("a", "b"):
        build_catalogue(CONFIG, data(), tmp_path / name)
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in ("tokens.npy", "tokenizer.json", "catalogue.json")
    )


def test_long_titles_are_cut(tmp_path):
    build_catalogue(replace(CONFIG, title_tokens=3), data(), tmp_path / "items")
    catalogue = Catalogue.load(tmp_path / "items")
    assert catalogue.depth == 4 and (catalogue.item_tokens(np.array(5)) > END).sum() == 3
    assert TITLES[5].startswith(spelt(catalogue, tmp_path / "items", 5))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"item 'i0' has no title \(6 of 6 items"):
        build_catalogue(CONFIG, data(None), tmp_path / "items")
    with pytest.raises(UserError, match=r"item 'i1' has no title \(1 of 6 items"):
        build_catalogue(CONFIG, data(["A", " ", *TITLES[2:]]), tmp_path / "items")
    with pytest.raises(UserError, match="items 'i2' and 'i4' have the same title within 32 tokens"):
        build_catalogue(replace(CONFIG, collisions="refuse"), data(), tmp_path / "items")
    with pytest.raises(UserError, match=r"items\.tokenizer"):
        build_catalogue(
            replace(CONFIG, tokenizer=str(tmp_path / "none.json")), data(), tmp_path / "items"
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(
        UserError, match=r"broken\.json: not a tokenizer\.json \(items\.tokenizer\)"
    ):
        build_catalogue(
            replace(CONFIG, tokenizer=str(tmp_path / "broken.json")), data(), tmp_path / "items"
        )
    for section, values, key in (
        ("items", {"collisions": "resolve"}, "items.collisions"),
        ("items", {"index": "x.index.json"}, "items.index"),
        ("train", {"targets": "all"}, "train.targets"),
    ):
        tree = {"items": {"form": "titles"}, "train": {"targets": "last"}}
        tree[section] = tree[section] | values
        with pytest.raises(ConfigError, match=key):
            config_from_dict(tree)


def test_a_given_tokenizer_neither_pads_nor_cuts(tmp_path):
    build_catalogue(CONFIG, data(), tmp_path / "items")
    tokenizer = load_tokenizer(tmp_path / "items" / TOKENIZER, "the test")
    tokenizer.enable_padding(pad_id=5, pad_token="!")
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "given.json"))
    build_catalogue(
        replace(CONFIG, tokenizer=str(tmp_path / "given.json")), data(), tmp_path / "again"
    )
    assert (tmp_path / "again/tokens.npy").read_bytes() == (
        tmp_path / "items/tokens.npy"
    ).read_bytes()


def test_a_title_with_the_models_end_of_text_in_it_is_spelt_as_words(tmp_path):
    titles = ["lamp", f"lamp{language_models.END}shade", f"{language_models.BEGIN} lamp"]
    model = language_models.make_language_model(tmp_path / "llama", titles)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    items = np.arange(3, dtype=np.int32)
    shop = InteractionDataset(items, np.array([0, 3]), ["u"], ["a", "b", "c"], titles)
    config = ItemsConfig(form="titles")
    build_catalogue(config, shop, tmp_path / "items", None, LanguageModel(model, rows))
    catalogue = Catalogue.load(tmp_path / "items")
    tokenizer = load_tokenizer(tmp_path / f"items/language_model/{TOKENIZER}", "the test")
    for item, title in enumerate(titles):
        *tokens, end = [t for t in catalogue.item_tokens(np.array(item)).tolist() if t != NO_TOKEN]
        assert end == catalogue.vocabulary.end and end not in tokens
        assert tokenizer.decode(tokens, skip_special_tokens=False) == title


def test_new_items_are_spelt_in_the_old_pieces(tmp_path):
    build_catalogue(CONFIG, data(), tmp_path / "old")
    add_items(
        tmp_path / "old", data(), ["n0"], tmp_path / "new", new_titles=["Dark violin strings"]
    )
    add_items(
        tmp_path / "new",
        replace(data(), item_ids=[*data().item_ids, "n0"]),
        ["n1"],
        tmp_path / "newer",
        new_titles=["Köln 東京 " + "guitar " * 99],
    )
    old, new = Catalogue.load(tmp_path / "old"), Catalogue.load(tmp_path / "newer")
    assert new.depth == 33 > old.depth and new.pieces == old.pieces and new.num_items == 8
    assert all(
        new.item_tokens(np.array(item))[: old.depth].tolist()
        == old.item_tokens(np.array(item)).tolist()
        for item in range(6)
    )
    assert (new.item_lengths(np.arange(6)) == old.item_lengths(np.arange(6))).all()
    assert spelt(new, tmp_path / "newer", 6) == "Dark violin strings" and spelt(
        new, tmp_path / "newer", 7
    ).startswith("Köln 東京 guitar")
    with pytest.raises(UserError, match="item 'n2' has no title"):
        add_items(tmp_path / "old", data(), ["n2"], tmp_path / "more", new_titles=[""])
    with pytest.raises(UserError, match="item 'n2' has no title"):
        add_items(tmp_path / "old", data(), ["n2"], tmp_path / "more")
    longer = data([*TITLES[:5], "Accordion"])
    build_catalogue(
        replace(CONFIG, tokenizer=str(tmp_path / "newer/tokenizer.json")),
        longer,
        tmp_path / "again",
    )
    again = Catalogue.load(tmp_path / "again")
    assert (
        all(
            (again.item_tokens(np.array(item))[:4] == old.item_tokens(np.array(item))[:4]).all()
            for item in range(5)
        )
        and again.pieces == old.pieces
    )
    assert spelt(again, tmp_path / "again", 5) == "Accordion"
