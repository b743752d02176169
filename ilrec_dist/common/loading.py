"""Functions by name, so that what they need is loaded when they are called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names."""
    module, _, function = name.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
