"""Rules of the code's structure that no linter
checks; CONTRIBUTING.md gives the reasons.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from ilrec_dist.objective.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "ilrec_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MOST_LATE_IMPORTS = 15
# kernels/ilrec_kernels/triton/kernels.py is the longest: its kernels share their device functions.
MOST_LINES = 460


def late_imports() -> Iterator[tuple[Path, int, bool]]:
    """(file, line, whether a comment stands
    above it) of every import inside a function.
    """
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        covered: set[int] = set()
        for function in ast.walk(ast.parse(text)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for statement in ast.walk(function):
                if not isinstance(statement, ast.Import | ast.ImportFrom):
                    continue
                if statement.lineno in covered:
                    continue
                covered.add(statement.lineno)
                above = statement.lineno - 2
                # Neighbouring imports share one comment.
                while above >= 0 and lines[above].strip().startswith(("import ", "from ")):
                    above -= 1
                yield path, statement.lineno, lines[above].strip().startswith("#")


def test_docstrings_are_at_most_88_columns_wide() -> None:
    folders = ("ilrec_dist", "kernels", "tests", "benchmarks", "examples")
    wide = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, OWNERS) or ast.get_docstring(node) is None:
                continue
            docstring = node.body[0]
            for number in range(docstring.lineno, (docstring.end_lineno or 0) + 1):
                if len(lines[number - 1]) > 88:
                    wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wide, wide


def test_imports_inside_functions_are_few_and_give_their_reason() -> None:
    imports = list(late_imports())
    places = [f"{path.relative_to(ROOT)}:{line}" for path, line, _ in imports]
    assert len(imports) <= MOST_LATE_IMPORTS, places
    silent = [
        place for place, (*_, commented) in zip(places, imports, strict=True) if not commented
    ]
    assert not silent, silent


def test_only_the_registry_names_a_method() -> None:
    naming = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in METHODS:
                naming.add(str(path.relative_to(ROOT)))
    # The command is called `ilrec` too, so its parser may say so.
    assert naming - {"ilrec_dist/cli/parser.py"} == {"ilrec_dist/objective/registry.py"}


def test_files_are_about_one_thing() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in SOURCES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long, long
