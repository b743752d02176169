"""Manifests: the SHA-256 of every file of a folder, written by its stage, checked by
readers.

`write_manifest` is called last, when a folder's files are complete; `verified` and
`verify` before a file is read. A file that has not changed since it was hashed in
this process, by its size and modification time, is not read again for its hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import (
    read_json_object,
    sha256_file,
    sha256_files,
    sha256_json,
    write_json,
)

MANIFEST = "manifest.json"
# What to do about a damaged file, unless the caller knows better.
REPAIR = "run `ilrec run CONFIG --verify` to make it again"
# The key of a JSON object's own checksum.
CHECKSUM = "checksum"

# (path, bytes, mtime in nanoseconds) -> hex SHA-256, of this process.
_hashes: dict[tuple[str, int, int], str] = {}


def cached_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, computed once a process unless its size or
    time changes.
    """
    path = Path(path).resolve()
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = sha256_file(path)
    return _hashes[key]


def hash_files(folder: str | Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Path below `folder` -> hex SHA-256 of the named files, hashed in parallel.

    Without names: of every file that is not hidden
    and is no manifest of the folder itself.
    """
    folder = Path(folder)
    names = sorted(folder_files(folder) if names is None else names)
    return sha256_files(folder, names, cached_sha256)


def folder_files(folder: str | Path) -> list[str]:
    """Paths below `folder` of its files, without hidden ones and the folder's own
    manifest.
    """
    folder = Path(folder)
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.as_posix() != MANIFEST and not any(part.startswith(".") for part in path.parts)
    )


def write_manifest(
    folder: str | Path,
    entries: Mapping[str, Any],
    names: Iterable[str] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write manifest.json: `entries`, and under "files" the bytes and SHA-256 of each
    file.

    hashes: those of the files where they are known; None: they are
    computed. To be called last. Returns what was written.
    """
    folder = Path(folder)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in (hashes or hash_files(folder, names)).items()
    }
    manifest = {**entries, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest_hashes(folder: str | Path, repair: str = REPAIR) -> dict[str, str]:
    """Path below `folder` -> SHA-256, as its manifest.json has them.

    Raises UserError that names the manifest where it is missing, or is none.
    """
    path = Path(folder) / MANIFEST
    manifest = read_json_object(path, repair)
    try:
        return {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: damaged (it names no files with their SHA-256); {repair}"
        ) from None


def verified(folder: str | Path, name: str, repair: str = REPAIR) -> Path:
    """The path of one file of the folder, after its bytes were compared with the
    manifest.

    Raises UserError when the file is missing, damaged or not in the manifest.
    """
    verify(folder, [name], repair)
    return Path(folder) / name


def verify(folder: str | Path, names: Iterable[str] | None = None, repair: str = REPAIR) -> None:
    """Compare the named files, or all of the manifest, with the manifest; in parallel.

    Raises UserError that names the first file that
    is missing, damaged or not in the manifest.
    """
    hashes = manifest_hashes(folder, repair)
    names = list(hashes if names is None else names)
    check_hashes(folder, {name: hashes.get(name) for name in names}, MANIFEST, repair)


def check_hashes(
    folder: str | Path, expected: Mapping[str, str | None], source: str, repair: str = REPAIR
) -> None:
    """Compare files with the hashes that `source`, a file's name, has for them.

    Raises UserError that names the first file, in the order of
    `expected`, that is missing, damaged, or without a hash (None).
    """
    folder = Path(folder)
    for name, digest in expected.items():
        if digest is None:
            raise UserError(f"{folder / name}: {source} has no hash of it; {repair}")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, although {source} names it; {repair}")
    hashes = hash_files(folder, expected)
    for name, digest in expected.items():
        if hashes[name] != digest:
            raise UserError(
                f"{folder / name}: damaged (its SHA-256 is not the one in {source}); {repair}"
            )


# A checksum in the file itself


def with_checksum(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The object as it is written: a byte that is changed later is found by its
    checksum.
    """
    return {**contents, CHECKSUM: sha256_json(contents)}


def without_checksum(written: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object that was written; None where its checksum is missing or of another
    one.
    """
    contents = {key: value for key, value in written.items() if key != CHECKSUM}
    return contents if written.get(CHECKSUM) == sha256_json(contents) else None
