"""The table of data formats.

Every module of this package is one, with its reader and writer.

To add a format, add one module that defines `FORMAT = Format(read, files, write)`
(`ilrec_dist.data.reading.source`); its name is the value of `data.format`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ilrec_dist.data.reading.source import Format

# The names of all formats, which `data.format` may take.
NAMES: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_format(name: str) -> Format:
    """The format of that name.

    Its module is imported now: the configuration needs names only.
    """
    return cast("Format", importlib.import_module(f"{__name__}.{name}").FORMAT)
