"""The decoding helper of an export: what it allows, and what it needs to run."""

from __future__ import annotations

import ast
import io
import itertools
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ilrec_dist.export import constrained_decoding
from ilrec_dist.items.catalogue import Catalogue, make_catalogue, make_title_catalogue
from ilrec_dist.items.vocabulary import NO_TOKEN
from tests.support.exported import export_items

MOST_CODE_LINES = 60
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def allowed(table: np.ndarray, prefix: tuple[int, ...], excluded: list[int]) -> list[int]:
    """The next tokens of the rows of `table` that begin with the prefix, ascending."""
    left = (table[:, : len(prefix)] == prefix).all(axis=1)
    left[excluded] = False
    tokens = np.unique(table[left, len(prefix)])
    return tokens[tokens != NO_TOKEN].tolist()


def drawn_catalogue(data: st.DataObject) -> Catalogue:
    """Of codes some of which are shared, or of titles some of which begin others."""
    if data.draw(st.booleans()):
        depth = data.draw(st.integers(1, 3))
        codes = st.tuples(*[st.integers(0, 3)] * depth)
        rows = data.draw(st.lists(codes, min_size=1, max_size=20))
        return make_catalogue(np.array(rows), [4] * depth)
    words = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
    titles = data.draw(st.lists(words, min_size=1, max_size=20, unique=True))
    numbers = [[*title, 0, *[-1] * (3 - len(title))] for title in titles]
    return make_title_catalogue(np.array(numbers, np.int32), ["<end>", "a", "b", "c"])


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_allowed_tokens_are_the_continuations_of_the_items_left(data, tmp_path_factory) -> None:
    catalogue = drawn_catalogue(data)
    trie = export_items(tmp_path_factory.mktemp("trie"), catalogue)
    table = np.asarray(catalogue.tokens)
    # A row may be excluded for several reasons.
    excluded = data.draw(st.lists(st.integers(0, len(table) - 1)))
    for length in range(trie.depth):
        for prefix in itertools.product(np.unique(table).tolist(), repeat=length):
            expected = allowed(table, prefix, excluded)
            assert trie.allowed(prefix, excluded) == (expected or [trie.padding])
    for row in table:
        (same,) = np.nonzero((table == row).all(axis=1))
        tokens = row[row != NO_TOKEN].tolist()
        assert list(trie.items(tokens + [trie.padding] * 2)) == same.tolist()
        assert trie.allowed(tokens, excluded) == [trie.padding]
        assert trie.items([*tokens, tokens[0]]) == range(0)


def test_other_tools_read_the_trie(tmp_path: Path) -> None:
    catalogue = make_catalogue(np.array([[0, 1], [0, 2], [1, 1], [2, 2], [2, 2]]), [3, 3])
    export_items(tmp_path, catalogue, "valid_next")
    arrays = load_file(tmp_path / "trie.csr")
    assert {str(array.dtype) for array in arrays.values()} == {"int64"}
    depth, padding, is_masked = arrays["depth_padding_masked_softmax"]
    assert (depth, padding, is_masked) == (2, catalogue.vocabulary.padding, 1)
    children = np.diff(arrays["child"])
    assert children.tolist() == [3, 2, 1, 1, 0, 0, 0, 0]
    assert arrays["tokens"][1:4].tolist() == sorted({row[0] for row in catalogue.tokens.tolist()})
    assert (arrays["last_row"] - arrays["first_row"]).tolist() == [5, 2, 1, 2, 1, 1, 1, 2]


def test_the_helper_needs_nothing_but_python(tmp_path: Path) -> None:
    catalogue = make_catalogue(np.array([[0, 1], [0, 2], [1, 1], [2, 0]]), [3, 3])
    trie = export_items(tmp_path, catalogue)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
for name in ("numpy", "torch", "safetensors"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported")
import constrained_decoding as c
trie = c.ItemTrie()
c.ItemLogitsProcessor(trie, 1)
print(trie.allowed([1]), trie.allowed([1], [0]), trie.items([1, 6, 0]))
"""
    # Without site-packages and environment variables.
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[5, 6] [6] {trie.items([1, 6, 0])}"
    assert list(trie.items([1, 6, 0])) == [1]


def test_the_helper_is_short_enough_to_be_read() -> None:
    text = Path(constrained_decoding.__file__).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            code -= set(range(docstring.lineno, docstring.end_lineno + 1))
    assert 0 < len(code) <= MOST_CODE_LINES
