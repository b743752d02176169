"""Reading inputs with errors that name the place, and committing an output folder all at once or not at all."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.errors import UserError


def map_array(path: Path) -> np.ndarray:
    """An .npy file as an array that takes memory only where it is read, and gives it back when others need it; not to be written to."""
    return np.asarray(
        np.load(path, mmap_mode="c")
    )  # torch wants memory that could be written: the file would not change


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def committed_folder(out: str | Path) -> Iterator[Path]:
    """A sibling folder to write into; it takes `out`'s place when the block ends well and vanishes when it does not.

    A reader of `out` sees the old folder, for an instant none, then the new one; never half of either.
    """
    out = Path(out)
    work = out.with_name(f".{out.name}.writing-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    work.mkdir()
    try:
        yield work
        put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Remove what processes that were killed while they wrote `out` left beside it."""
    for leftover in out.parent.glob(f".{out.name}.*-*"):
        if leftover.name.startswith(
            (f".{out.name}.writing-", f".{out.name}.previous-")
        ) and not _running(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover, ignore_errors=True)


def put_in_place(work: Path, out: Path) -> None:
    """The folder `work`, of the same file system, becomes `out`; what was there vanishes."""
    previous = out.with_name(f".{out.name}.previous-{os.getpid()}")
    try:
        if out.exists():
            os.replace(out, previous)
        os.replace(work, out)
    finally:
        shutil.rmtree(previous, ignore_errors=True)


def _running(pid: str) -> bool:
    """Whether a process other than this one has that number."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_json(path: Path, value: Any) -> None:
    """All of it, or, when the process is killed, what was there before."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object; a repeated key is an error, for one of the two values would be lost in silence.

    Raises UserError naming the file and, for malformed JSON, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UserError(
                f"{path}: the key {repeated!r} occurs twice in one object; keep one of them"
            )
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object at the top, found {type(value).__name__}")
    return value


def require_file(path: str | Path, what: str) -> Path:
    """The path, if it is a file that exists; UserError otherwise."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file ({what})")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file ({what})")
    return path


def require_columns(path: Path, wanted: dict[str, str], present: Sequence[str]) -> None:
    """Each wanted column (name → the config key that chose it) must be present, once; the error names the nearest one that is."""
    for name, key in wanted.items():
        if name not in present:
            nearest = difflib.get_close_matches(name, present, n=1, cutoff=0.0)
            hint = f"; the nearest column is {nearest[0]!r}" if nearest else ""
            listed = ", ".join(map(str, present))
            raise UserError(
                f"{path}: no column {name!r} ({key}){hint}; the file has: {listed if len(listed) <= 500 else listed[:500] + ' …'}"
            )
        if list(present).count(name) > 1:
            raise UserError(
                f"{path}: the column {name!r} ({key}) occurs twice; rename or drop one of them"
            )


def single_file(folder: Path, suffixes: Iterable[str], what: str) -> Path:
    """The one file in `folder` whose name ends in one of `suffixes`; none or several are errors that list what was found."""
    suffixes = tuple(suffixes)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder ({what})")
    found = sorted(path for path in folder.iterdir() if path.name.endswith(suffixes))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise UserError(
            f"{folder}: expected one file named *{' or *'.join(suffixes)} ({what}), found {names}; name the file itself in data.path"
        )
    return found[0]
