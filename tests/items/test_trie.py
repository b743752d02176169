"""The catalogue's order and the range trie against a dictionary of prefixes."""

from __future__ import annotations

import json
from collections import defaultdict
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilrec_dist.common.errors import UserError
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie


@st.composite
def code_tables(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rows = draw(
        st.lists(st.tuples(*(st.integers(0, size - 1) for size in sizes)), min_size=1, max_size=40)
    )
    return np.array(rows, np.int32), sizes


class PrefixReference:
    """The trie as a dictionary: prefix → next tokens, prefix → items."""

    def __init__(self, catalogue):
        self.next, self.items = defaultdict(set), defaultdict(list)
        for item in range(catalogue.num_items):
            tokens = tuple(catalogue.item_tokens(item).tolist())
            for depth in range(len(tokens) + 1):
                self.items[tokens[:depth]].append(item)
                if depth < len(tokens):
                    self.next[tokens[:depth]].add(tokens[depth])

    def prefixes(self, depth):
        return sorted(prefix for prefix in self.items if len(prefix) == depth)


@settings(max_examples=100, deadline=None)
@given(code_tables())
def test_catalogue_is_in_code_order_with_ties_by_item(table):
    codes, sizes = table
    catalogue = make_catalogue(codes, sizes)
    expected = sorted(range(len(codes)), key=lambda item: (*codes[item].tolist(), item))
    assert catalogue.items.tolist() == expected
    assert (catalogue.items[catalogue.position] == np.arange(len(codes))).all()
    assert (catalogue.codes() == codes).all()
    assert catalogue.vocab_size == 1 + sum(sizes)
    assert sorted(catalogue.token_names()) == list(range(1, 1 + sum(sizes)))
    letters = "abcd"
    names = catalogue.token_names()
    assert [names[token] for token in catalogue.item_tokens(0)] == [
        f"<{letters[level]}_{code}>" for level, code in enumerate(codes[0])
    ]


@settings(max_examples=150, deadline=None)
@given(code_tables(), st.randoms(use_true_random=False))
def test_trie_agrees_with_a_dictionary_of_prefixes(table, random):
    catalogue = make_catalogue(*table)
    trie, reference = Trie(catalogue), PrefixReference(catalogue)
    for depth in range(catalogue.depth + 1):
        prefixes = reference.prefixes(depth)
        nodes = np.array([random.randrange(len(prefixes)) for _ in range(7)])
        assert trie.num_nodes(depth) == len(prefixes)
        items_ptr, items = trie.range_items(depth, nodes)
        for row, node in enumerate(nodes):
            assert (
                sorted(items[items_ptr[row] : items_ptr[row + 1]])
                == reference.items[prefixes[node]]
            )
        assert [
            prefixes[node] for node in trie.item_node(depth, np.arange(catalogue.num_items))
        ] == [
            tuple(catalogue.item_tokens(item)[:depth].tolist())
            for item in range(catalogue.num_items)
        ]
        if depth == catalogue.depth:
            leaf_ptr, leaves = trie.leaf_items(nodes)
            for row, node in enumerate(nodes):
                assert (
                    leaves[leaf_ptr[row] : leaf_ptr[row + 1]].tolist()
                    == reference.items[prefixes[node]]
                ), "tied items in item order"
            break
        assert all(
            prefix[-1] == token
            for prefix, token in zip(
                reference.prefixes(depth + 1), trie.node_token[depth + 1], strict=True
            )
        )
        indptr, tokens, children = trie.children(depth, nodes)
        assert indptr.dtype == tokens.dtype == children.dtype == np.int64
        assert all(
            (one == two).all()
            for one, two in zip(trie.candidates(depth, nodes), (indptr, tokens), strict=True)
        )
        alike = np.repeat(nodes[:1], 5)
        assert all(
            (one == two).all()
            for one, two in zip(
                trie.candidates(depth, alike), trie.children(depth, alike)[:2], strict=True
            )
        )
        below = reference.prefixes(depth + 1)
        for row, node in enumerate(nodes):
            chosen = slice(indptr[row], indptr[row + 1])
            assert tokens[chosen].tolist() == sorted(reference.next[prefixes[node]])
            assert [below[child] for child in children[chosen]] == [
                (*prefixes[node], token) for token in tokens[chosen].tolist()
            ]
        trial = np.arange(catalogue.vocab_size + 1)[:, None]
        for (token,), row_nodes in zip(trial, trie.step(depth, nodes[None, :], trial), strict=True):
            for node, child in zip(nodes, row_nodes, strict=True):
                prefix = (*prefixes[node], int(token))
                assert (below[child] == prefix) if child >= 0 else (prefix not in reference.items)


@settings(max_examples=60, deadline=None)
@given(code_tables(), st.lists(st.integers(0, 1000), max_size=6))
def test_target_candidates_are_the_children_of_every_prefix_of_the_target(table, targets):
    catalogue = make_catalogue(*table)
    trie, reference = Trie(catalogue), PrefixReference(catalogue)
    targets = np.array(targets, np.int64) % catalogue.num_items
    indptr, tokens = trie.target_candidates(targets)
    expected = [
        sorted(reference.next[tuple(catalogue.item_tokens(target)[:depth].tolist())])
        for target in targets
        for depth in range(catalogue.depth)
    ]
    assert [tokens[a:b].tolist() for a, b in zip(indptr[:-1], indptr[1:], strict=True)] == expected
    assert (
        indptr.dtype == tokens.dtype == np.int64
        and len(indptr) == len(targets) * catalogue.depth + 1
    )


def test_step_from_no_node_is_no_node():
    trie = Trie(make_catalogue(np.array([[0, 0], [1, 1]]), [2, 2]))
    assert trie.step(0, np.array([-1, 0, 0]), np.array([1, 1, 3])).tolist() == [-1, 0, -1]
    assert trie.step(1, np.array([[0], [1]]), np.array([3, 4])).tolist() == [[0, -1], [-1, 1]]


def test_save_and_load_round_trip_and_damage_is_named(tmp_path):
    catalogue = make_catalogue(np.array([[1, 0], [0, 1], [0, 1]]), [2, 2], ["x", "y"])
    catalogue.save(tmp_path)
    loaded = Catalogue.load(tmp_path)
    for name in ("tokens", "items", "position"):
        assert (getattr(loaded, name) == getattr(catalogue, name)).all() and getattr(
            loaded, name
        ).dtype == np.int32
    assert loaded.level_sizes == catalogue.level_sizes
    assert loaded.token_names() == {1: "<x_0>", 2: "<x_1>", 3: "<y_0>", 4: "<y_1>"}
    assert vars(loaded.vocabulary).keys() == vars(catalogue.vocabulary).keys()
    assert all(
        np.array_equal(value, getattr(catalogue.vocabulary, name))
        for name, value in vars(loaded.vocabulary).items()
    )
    data = bytearray((tmp_path / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tokens.npy").write_bytes(data)
    with pytest.raises(UserError, match="tokens.npy: damaged"):
        Catalogue.load(tmp_path)
    with pytest.raises(UserError, match="not a catalogue folder"):
        Catalogue.load(tmp_path / "nowhere")


def arrays_of(trie):
    return [*trie.node_start, *trie.child_start, *trie.node_token, trie._tokens]


@settings(max_examples=50, deadline=None)
@given(code_tables())
def test_a_stored_trie_is_the_trie(table):
    catalogue = make_catalogue(*table)
    built = Trie(catalogue)
    with TemporaryDirectory() as folder:
        catalogue.save(folder)
        built.save(folder)
        stored = Trie.load(folder, Catalogue.load(folder))
        for one, two in zip(arrays_of(built), arrays_of(stored), strict=True):
            assert one.dtype == two.dtype and one.tolist() == two.tolist()
        items = np.arange(len(table[0]))
        for one, two in zip(
            built.target_candidates(items), stored.target_candidates(items), strict=True
        ):
            assert one.tolist() == two.tolist()
        assert stored.nbytes == built.nbytes


def test_stored_arrays_are_mapped_and_damage_is_named(tmp_path):
    catalogue = make_catalogue(np.array([[1, 0], [0, 1], [0, 1]]), [2, 2])
    catalogue.save(tmp_path)
    Trie(catalogue).save(tmp_path)
    loaded = Catalogue.load(tmp_path)
    for array in (
        loaded.tokens,
        loaded.items,
        loaded.position,
        *Trie.load(tmp_path, loaded).node_start,
    ):
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert isinstance(array, np.memmap)
    data = bytearray((tmp_path / "trie.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "trie.npy").write_bytes(data)
    with pytest.raises(UserError, match="trie.npy: damaged"):
        Trie.load(tmp_path, loaded)


def test_a_catalogue_of_another_format_is_refused(tmp_path):
    catalogue = make_catalogue(np.array([[1, 0], [0, 1], [0, 1]]), [2, 2])
    catalogue.save(tmp_path)
    meta = json.loads((tmp_path / "catalogue.json").read_text())
    (tmp_path / "catalogue.json").write_text(json.dumps(meta | {"version": 1}))
    with pytest.raises(UserError, match=r"catalogue\.json: version 1, expected 3; remove .* again"):
        Catalogue.load(tmp_path)


def test_codes_outside_their_level_are_refused():
    for codes in (np.array([[2]]), np.array([[-1]]), np.array([[0, 0]])):
        with pytest.raises(ValueError, match="do not fit"):
            make_catalogue(codes, [2])


def test_large_trie_stays_small():
    random = np.random.default_rng(0)
    # This is as dense per prefix as 10⁷ items in 4 × 256 codes.
    codes = np.column_stack(
        [random.integers(256, size=(200_000, 2)), random.integers(16, size=(200_000, 2))]
    )
    trie = Trie(make_catalogue(codes, [256, 256, 16, 16]))
    assert trie.nbytes / trie.catalogue.num_items <= 24
