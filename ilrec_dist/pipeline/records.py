"""The record of a finished stage, `.stages/NAME.json`: the manifest of what the stage
wrote.

It holds the stage's fingerprint, bytes, time and SHA-256 of every file of its
output, the hash of the outputs that the stage stands on, and a checksum of all this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import sha256_json
from ilrec_dist.common.manifest import (
    MANIFEST,
    REPAIR,
    cached_sha256,
    check_hashes,
    folder_files,
    hash_files,
    without_checksum,
)
from ilrec_dist.common.run_layout import RESULT, RunFolders

# Files that tell when or how something was made, and differ between two equal outputs.
UNSTABLE = frozenset(
    {"manifest.json", "report.json", "result.json", "metrics.jsonl", "actor-counters.json"}
)

# Files of an output that describe the others.
DESCRIPTIONS = (MANIFEST, RESULT)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record's content; None where there is none, or it is not as it was written."""
    record = _read_object(path)
    return None if record is None else without_checksum(record)


def read_begun(path: Path) -> dict[str, Any] | None:
    """The fingerprint and settings of a stage's last attempt; None where there is no
    note of it (`.stages/NAME.begun.json`), or it is damaged.
    """
    begun = _read_object(path)
    return begun if begun is not None and "fingerprint" in begun else None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def describe_files(output: Path, required: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Path below `output` -> bytes, modification time and SHA-256.

    Of the required files and folders, or of all where `required` is None.
    """
    names = []
    for part in ("",) if required is None else required:
        if (output / part).is_dir():
            inside = [*folder_files(output / part), MANIFEST]
            names += [(Path(part) / name).as_posix() for name in inside]
        else:
            names.append(part)
    names = [name for name in names if (output / name).is_file()]
    hashes = hash_files(output, names)
    described = {}
    for name in names:
        status = (output / name).stat()
        described[name] = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": hashes[name],
        }
    return described


def damaged_file(output: Path, record: Mapping[str, Any], verify: bool = False) -> str | None:
    """The first file of a stage's output that is not what its record says; None if all
    are whole. Compared as by `damaged_files`.
    """
    return next(damaged_files(output, record, verify), None)


def damaged_files(output: Path, record: Mapping[str, Any], verify: bool = False) -> Iterator[str]:
    """The files of a stage's output that are not what its record says.

    Size and time are compared, and the hash where only the time differs,
    as after a copy. With `verify` all hashes are compared, in parallel.
    """
    doubtful: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = record["files"]
    for name, expected in files.items():
        try:
            status = (output / name).stat()
        except OSError:
            yield name
            continue
        if status.st_size != expected["bytes"]:
            yield name
        elif verify or status.st_mtime_ns != expected["mtime_ns"]:
            doubtful[name] = expected["sha256"]
    if verify:
        hashes = hash_files(output, doubtful)
    else:
        hashes = {name: cached_sha256(output / name) for name in doubtful}
    yield from (name for name, digest in doubtful.items() if hashes[name] != digest)


def content_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 that identifies what a stage wrote; equal outputs made at other times
    have one.
    """
    files = [
        (name, entry["sha256"])
        for name, entry in sorted(record["files"].items())
        if Path(name).name not in UNSTABLE
    ]
    return sha256_json(files)


def usable_record(folders: RunFolders, name: str) -> dict[str, Any] | None:
    """The record of a stage, None where there is none.

    Raises UserError that names the record's file where it cannot be used.
    """
    path = folders.stages / f"{name}.json"
    record = read_record(path)
    if record is None and path.exists():
        raise UserError(f"{path}: damaged (no whole record of a finished stage); {REPAIR}")
    return record


def verify_descriptions(folders: RunFolders, name: str) -> None:
    """Compare what describes a stage's output with the hashes in the stage's record.

    That is its manifest.json, which has the hashes of the other files, or
    the result.json of a training. Nothing is compared where the stage has no
    record. Raises UserError that names the file that is missing or damaged.
    """
    record = usable_record(folders, name)
    if record is not None:
        files = {file: entry["sha256"] for file, entry in record["files"].items()}
        check_hashes(
            folders.root / record["output"],
            {file: files[file] for file in DESCRIPTIONS if file in files},
            f".stages/{name}.json",
        )


def check_stands_on(folders: RunFolders, name: str, wanted: Sequence[str]) -> None:
    """What stage `name` stands on, among `wanted` stages, must be what lies in the
    folder now.

    Follows the chain, and compares the records'
    hashes only. Raises UserError that names both.
    """
    record = usable_record(folders, name)
    if record is None:
        return
    verify_descriptions(folders, name)
    for before, digest in record["inputs"].items():
        if before not in wanted:
            continue
        earlier = usable_record(folders, before)
        if earlier is None or content_hash(earlier) != digest:
            raise UserError(
                f"{folders.root}: {name} was made with another output of stage {before} than the "
                f"one in {folders.root / record_output(before, earlier)}; run `ilrec run CONFIG` "
                "to make it again, or bring the earlier output back"
            )
        check_stands_on(folders, before, wanted)


def record_output(name: str, record: Mapping[str, Any] | None) -> str:
    return record["output"] if record is not None else name


def verify_output(folders: RunFolders, name: str, files: Sequence[str] | None = None) -> None:
    """Compare files of a finished stage, or all, with the hashes in its record, in
    parallel.

    Raises UserError that names the first one that is missing or damaged.
    """
    record = usable_record(folders, name)
    if record is not None:
        check_hashes(
            folders.root / record["output"],
            {
                file: entry["sha256"]
                for file, entry in record["files"].items()
                if files is None or file in files
            },
            f".stages/{name}.json",
        )
