"""Rules of the code's structure that no linter
checks; CONTRIBUTING.md gives the reasons.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

from ilrec_dist.objective.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "ilrec_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MOST_LATE_IMPORTS = 15
MOST_LINES = 400
# The longest files, and the lines that each may have.
LONG_FILES = {
    # The kernels share their device functions.
    "kernels/ilrec_kernels/triton/kernels.py": 460,
    # All flags and their help.
    "ilrec_dist/cli/parser.py": 460,
    # All that happens to one training, a method for each.
    "ilrec_dist/training/trainer.py": 460,
}


@functools.cache
def parsed(path: Path) -> tuple[list[str], list[ast.AST]]:
    """The lines of a file and the nodes of its syntax tree."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), list(ast.walk(ast.parse(text)))


def is_late_import(node: ast.AST) -> bool:
    """An import statement, or a call that imports what a literal names."""
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        name = called.id if isinstance(called, ast.Name) else called
        return name in ("import_module", "__import__", "load_function")
    return isinstance(node, ast.Import | ast.ImportFrom)


def late_imports() -> Iterator[tuple[Path, int, bool]]:
    """(file, line, whether a comment stands
    above it) of every import inside a function.
    """
    for path in SOURCES:
        lines, nodes = parsed(path)
        covered: set[int] = set()
        for function in nodes:
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for statement in ast.walk(function):
                if not is_late_import(statement):
                    continue
                if statement.lineno in covered:
                    continue
                covered.add(statement.lineno)
                above = statement.lineno - 2
                # Neighbouring imports share one comment.
                while above >= 0 and lines[above].strip().startswith(("import ", "from ")):
                    above -= 1
                yield path, statement.lineno, lines[above].strip().startswith("#")


def owners(node: Owner) -> Iterator[Owner]:
    """A module, class or function, and those in its body."""
    yield node
    for child in node.body:
        if isinstance(child, Owner):
            yield from owners(child)


def test_docstrings_are_at_most_88_columns_wide() -> None:
    folders = ("ilrec_dist", "kernels", "tests", "benchmarks", "examples")
    wide = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in owners(ast.parse(text)):
            if ast.get_docstring(node) is None:
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


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("ilrec_dist", "ilrec_kernels", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    # Raises CycleError, which names the circle.
    TopologicalSorter(imported).prepare()


def test_names_say_what_they_hold() -> None:
    words = "found given told own each both only others some one gone turn place listed"
    vague = set(words.split())
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
        for path in SOURCES
        for node in parsed(path)[1]
        if isinstance(node, ast.Name | ast.arg)
        and (name := node.id if isinstance(node, ast.Name) else node.arg) in vague
    ]
    assert not places, places


def test_sections_of_the_method_that_the_code_cites_exist() -> None:
    headings = re.findall(r"^## (\d+)\.", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    missing = {}
    for path in SOURCES:
        for cited in re.findall(r"METHOD\.md\s+§+([\d–, -]*\d)", path.read_text(encoding="utf-8")):
            if not set(re.findall(r"\d+", cited)) <= set(headings):
                missing[str(path.relative_to(ROOT))] = cited
    assert headings and not missing, missing


def test_only_the_registry_names_a_method() -> None:
    naming = set()
    for path in SOURCES:
        for node in parsed(path)[1]:
            if isinstance(node, ast.Constant) and node.value in METHODS:
                naming.add(str(path.relative_to(ROOT)))
    # The command is called `ilrec` too, so its parser may say so.
    assert naming - {"ilrec_dist/cli/parser.py"} == {"ilrec_dist/objective/registry.py"}


# What commands that only drive workers, or that start none, must not wait for.
HEAVY = ("megatron", "deepspeed", "transformers", "torch._dynamo", "tensorboard")


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (["cli.main", "cli.print_config"], [*HEAVY, "torch", "ray", "scipy"]),
        pytest.param(
            ["pipeline.execute", "pipeline.status", "study.run", "plan.describe"],
            HEAVY,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_commands_load_no_more_than_they_use(modules: list[str], heavy: list[str]) -> None:
    names = [f"ilrec_dist.{name}" for name in modules]
    program = (
        f"import sys, {', '.join(names)}; print(*(n for n in {list(heavy)} if n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not done.stdout.split()


def test_files_are_about_one_thing() -> None:
    counts = {str(path.relative_to(ROOT)): len(parsed(path)[0]) for path in SOURCES}
    long = {name: count for name, count in counts.items() if count > MOST_LINES}
    too_long = [name for name, count in long.items() if count > LONG_FILES.get(name, 0)]
    assert not too_long, long
    # A file that became shorter loses its exception.
    assert long.keys() == LONG_FILES.keys()
