"""Functions by name, so that what they need is loaded when they are called."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names."""
    module, _, function = name.partition(":")
    with uncollected_imports():
        imported = importlib.import_module(module)
    loaded: Callable[..., Any] = getattr(imported, function)
    return loaded


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import in the block without garbage collections.

    A worker's imports make hundreds of thousands of objects that live as long as the
    process. Looking among them for garbage takes a seventh of the time of its imports.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
