"""Python literals, as some published files have them in place of JSON, with bounded
work.
"""

from __future__ import annotations

import ast
from typing import Any

# Longer ones are refused: parsing takes about 100 bytes of memory a character.
MAX_CHARACTERS = 1 << 20


def parse_literal(text: str) -> Any:
    """The value of a Python literal; a bare nan is None. No code is run.

    Raises ValueError where the text is none, or is too long or too deeply nested.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a literal of {len(text):,} characters; at most {MAX_CHARACTERS:,}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return ast.literal_eval(_NanIsNone().visit(tree) if "nan" in text else tree)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python literal ({type(error).__name__})") from None


class _NanIsNone(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(None), node) if node.id == "nan" else node
