"""Files: reading inputs with errors that name the place, atomic writes, locks, SHA-256.

What a process writes appears whole or not at all: `atomic_file` for one file, which
`write_text`, `write_json` and `write_array` use, `committed_folder` for a folder.
`file_lock`, `acquire_lock` and `inherit_lock` are the only locks, `sha256_file` and
`sha256_files` the only hashes of files, `sha256_json` that of values.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.disk import writing_to
from ilrec_dist.common.errors import NotWritable, UserError

# Threads that hash files at once: enough to keep a disk busy.
HASH_THREADS = 8
# Characters of a file's column names that an error shows.
SHOWN_COLUMNS = 500
LOCK_POLL_SECONDS = 0.1


def map_array(path: Path) -> np.ndarray:
    """Map an .npy file into memory.

    Pages are read when used and shared between processes.

    The array is not to be written to. (The mode is copy-on-write because torch refuses
    read-only memory; the file would not change.)
    """
    return np.asarray(np.load(path, mmap_mode="c"))


# Hashes


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(
    folder: str | Path, names: Iterable[str], hash_file: Callable[[Path], str] = sha256_file
) -> dict[str, str]:
    """Name → hex SHA-256 of files in `folder`, hashed in parallel."""
    folder, names = Path(folder), list(names)
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="sha256") as pool:
        hashes = pool.map(lambda name: hash_file(folder / name), names)
        return dict(zip(names, hashes, strict=True))


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Atomic writes


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to.

    It replaces `path` when the block ends well.

    If the block raises, the staged file vanishes and what was at `path` stays; a
    process that is killed leaves it as `.NAME.writing-PID`. Raises NotWritable
    where the disk is full, read-only or not this user's.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with writing_to(path):
            yield staged
            os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write an array as .npy, atomically."""
    # numpy appends .npy to a name, and leaves an open file's alone.
    with atomic_file(path) as staged, open(staged, "wb") as file:
        np.save(file, array)


@contextmanager
def committed_folder(out: str | Path) -> Iterator[Path]:
    """Yield a sibling folder to write into.

    It takes the place of `out` when the block ends well.

    If the block raises, the sibling vanishes. A reader of `out` sees the old folder,
    for an instant none, then the new one; never half of either. Raises
    NotWritable where the disk is full, read-only or not this user's.
    """
    out = Path(out)
    staged = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        with writing_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(out)
            staged.mkdir()
            yield staged
            put_in_place(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Remove what processes that were killed while they wrote `out` left beside it."""
    for leftover in out.parent.glob(f".{_escaped(out.name)}.*-*"):
        kind, _, pid = leftover.name.removeprefix(f".{out.name}.").partition("-")
        if kind in ("writing", "previous") and not _running(pid):
            shutil.rmtree(leftover, ignore_errors=True)


def put_in_place(staged: Path, out: Path) -> None:
    """Rename the folder `staged` to `out`, on the same file system.

    The old folder vanishes.
    """
    previous = out.with_name(f".{out.name}.previous-{os.getpid()}")
    try:
        if out.exists():
            os.replace(out, previous)
        os.replace(staged, out)
    finally:
        shutil.rmtree(previous, ignore_errors=True)


def _escaped(name: str) -> str:
    """The name as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


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


# Locks


def acquire_lock(path: str | Path, wait: bool = True) -> int:
    """Lock a file, which is created where missing, or a folder, which must exist.

    Returns a file descriptor; closing it, or the end of the process, releases the lock.
    Raises BlockingIOError if another process holds the lock and `wait` is false.
    """
    path = Path(path)
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def file_lock(path: str | Path, wait: bool = True) -> Iterator[int]:
    """Hold `acquire_lock(path, wait)` for a block; yields the file descriptor."""
    handle = acquire_lock(path, wait)
    try:
        yield handle
    finally:
        os.close(handle)


def inherit_lock(path: Path, patience: float) -> int:
    """Lock a file that the last processes of a killed command may still hold.

    Returns a file descriptor, as `acquire_lock` does. The file says which process holds
    it. Raises NotWritable where another one still does after `patience` seconds: that
    is no fault of the input, for which a command's work would be taken back.
    """
    until = time.monotonic() + patience
    while True:
        try:
            handle = acquire_lock(path, wait=False)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise NotWritable(
                    f"{path.parent}: process {path.read_text()}, of an earlier command or attempt, "
                    f"still holds it after {patience:g} s and may hang; end that process"
                ) from None
            time.sleep(LOCK_POLL_SECONDS)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {platform.node()}".encode())
    except BaseException:
        os.close(handle)
        raise
    return handle


# Reading inputs


def read_json_object(path: Path, repair: str | None = None) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    A repeated key is an error, because one of its two values would be lost in silence.
    Raises UserError naming the file and, for malformed JSON, line and column; where the
    file is the project's own, `repair` says what to do about it.
    """
    try:
        return _read_json_object(path)
    except UserError as error:
        if repair is None:
            raise
        raise UserError(f"{error}; {repair}") from None


def _read_json_object(path: Path) -> dict[str, Any]:
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
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
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


def require_columns(path: Path, wanted: Mapping[str, str], present: Sequence[str]) -> None:
    """Check that each wanted column is present exactly once.

    wanted: column name → the configuration key that chose it. Raises UserError naming
    the nearest column that is present.
    """
    for name, key in wanted.items():
        if name not in present:
            nearest = difflib.get_close_matches(name, present, n=1, cutoff=0.0)
            hint = f"; the nearest column is {nearest[0]!r}" if nearest else ""
            shown = ", ".join(map(str, present))
            if len(shown) > SHOWN_COLUMNS:
                shown = shown[:SHOWN_COLUMNS] + " …"
            raise UserError(f"{path}: no column {name!r} ({key}){hint}; the file has: {shown}")
        if list(present).count(name) > 1:
            raise UserError(
                f"{path}: the column {name!r} ({key}) occurs twice; rename or drop one of them"
            )


def single_file(folder: Path, suffixes: Iterable[str], what: str) -> Path:
    """The one file in `folder` whose name ends in one of `suffixes`.

    Raises UserError that lists the candidates when there is none or more than one.
    """
    suffixes = tuple(suffixes)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder ({what})")
    candidates = sorted(path for path in folder.iterdir() if path.name.endswith(suffixes))
    if len(candidates) != 1:
        names = ", ".join(path.name for path in candidates[:5]) or "none"
        raise UserError(
            f"{folder}: expected one file named *{' or *'.join(suffixes)} ({what}), "
            f"found {names}; name the file itself in data.path"
        )
    return candidates[0]
