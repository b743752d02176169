"""Where nothing can be written: a full disk, a
read-only one, and a folder of another user.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ilrec_dist.common.errors import NotWritable, UserError

# What the system calls each, and what is to be done about it.
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make it writable",
    errno.EACCES: "give this user access to it",
}
# How libraries say that a write was cut short, and not why: torch twice, and NumPy.
CUT_SHORT = ("PytorchStreamWriter", "iostream error", "inline_container.cc", " requested and ")
# What is written to find out whether anything can be written.
PROBE_BYTES = 1 << 20


def not_writable(error: BaseException, path: str | Path) -> NotWritable | None:
    """The error to raise where this one comes of such a
    place, which is `path` unless it says so itself; else None.

    Libraries report that in words of their own, so what they were handling counts
    as well, and for a failed write whether `path` can be written to now.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NotWritable):
            return seen
        number = _number(seen)
        if number is not None and number in REMEDIES:
            # A name without its folder comes of a call that had the folder open.
            named = str(getattr(seen, "filename", None) or "")
            return _of_number(number, named if os.path.dirname(named) else path)
        seen = seen.__cause__ or seen.__context__
    if any(words in str(error) for words in CUT_SHORT):
        folder = next(
            above for above in (Path(path), *Path(path).absolute().parents) if above.is_dir()
        )
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
        except OSError as refused:
            if refused.errno is not None and refused.errno in REMEDIES:
                return _of_number(refused.errno, path)
    return None


@contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Raise NotWritable where the block cannot write to `path`."""
    try:
        yield
    except UserError:
        # What it was handling may be an input that cannot be read.
        raise
    except Exception as error:
        refusal = not_writable(error, path)
        if refusal is None or refusal is error:
            raise
        raise refusal from error


def _number(error: BaseException) -> int | None:
    """The system's number for the error. Libraries in
    Rust and C++ have its words in their message alone.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return next((number for number in disk if os.strerror(number) in str(error)), None)


def _of_number(number: int, path: str | Path) -> NotWritable:
    return NotWritable(f"{path}: {os.strerror(number)}; {REMEDIES[number]}")
