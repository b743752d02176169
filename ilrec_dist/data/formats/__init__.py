"""The data formats: every module of this package is one, with its reader and writer.

To add a format, add one module that defines `FORMAT = Format(read, files, write)`
(`ilrec_dist.data.reading.source`); its name is the value of `data.format`.
"""

import pkgutil

# The names of all formats, which `data.format` may take.
NAMES: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
