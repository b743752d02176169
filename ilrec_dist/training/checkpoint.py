"""Checkpoints committed atomically with a SHA-256 manifest: damaged ones are refused by name and the one before is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    state: dict[
        str, Any
    ]  # what the loop needs besides the engine's own files: data position, best validation so far


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def staging_folder(folder: Path, step: int) -> Path:
    return folder / f".writing-{step:08d}"


def commit(folder: Path, step: int, state: dict[str, Any], fingerprint: str, keep: int) -> Path:
    """Hash every file of the staged checkpoint, write the manifest, rename it into place, drop the oldest beyond `keep`. One process calls this."""
    staged = staging_folder(folder, step)
    files = {
        str(path.relative_to(staged)): file_sha256(path)
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    manifest = staged / MANIFEST
    manifest.write_text(
        json.dumps(
            {"step": step, "fingerprint": fingerprint, "state": state, "sha256": files}, indent=1
        )
    )
    for path in [staged / name for name in files] + [manifest]:
        _sync(path)
    final = folder / f"step-{step:08d}"
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    _sync(folder)
    for old in _committed(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path, fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint (None when there never was one) and, for each damaged one passed over, a line that says what is wrong.

    Raises UserError when all are damaged, and when a checkpoint belongs to another configuration.
    """
    damaged: list[str] = []
    for path in reversed(_committed(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            problem = next(
                (
                    name
                    for name, digest in manifest["sha256"].items()
                    if not _matches(path / name, digest)
                ),
                None,
            )
        except (OSError, ValueError, KeyError):
            damaged.append(f"{path / MANIFEST}: the manifest is missing or malformed")
            continue
        if problem is not None:
            damaged.append(f"{path / problem}: missing, or its SHA-256 differs from the manifest's")
            continue
        if manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: this checkpoint belongs to another configuration; restore that configuration, or choose another name or runs_dir"
            )
        return Checkpoint(path, int(manifest["step"]), manifest["state"]), damaged
    if damaged:
        raise UserError(
            f"{damaged[0]}; no earlier checkpoint is left to fall back on; delete {folder} to train from the start"
        )
    return None, damaged


def _committed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _matches(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk, so that the rename cannot outlive the bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
