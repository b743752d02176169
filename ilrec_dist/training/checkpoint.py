"""Checkpoints committed atomically with a SHA-256 manifest.

A damaged checkpoint is passed over with a line that names the file, and the one before it is
used.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import sha256_file, sha256_files

MANIFEST = "manifest.json"
STAGING = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    # What the trainer needs besides the engine's own files.
    state: dict[str, Any]


def staging_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it is committed."""
    return folder / f"{STAGING}{step:08d}"


def make_staging_folder(staged: Path) -> None:
    """Make the folder, and remove what killed writers left beside it. One process calls this."""
    for leftover in staged.parent.glob(f"{STAGING}*"):
        shutil.rmtree(leftover)
    staged.mkdir(parents=True)


def commit(folder: Path, step: int, state: dict[str, Any], fingerprint: str, keep: int) -> Path:
    """Hash every file of the staged checkpoint, write the manifest, rename it into place.

    The oldest checkpoints beyond `keep` are dropped. One process calls this.
    """
    staged = staging_folder(folder, step)
    names = [str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()]
    hashes = sha256_files(staged, sorted(names))
    manifest = staged / MANIFEST
    contents = {"step": step, "fingerprint": fingerprint, "state": state, "sha256": hashes}
    manifest.write_text(json.dumps(contents, indent=1))
    for path in [staged / name for name in hashes] + [manifest]:
        _sync(path)
    final = folder / f"step-{step:08d}"
    if final.exists():
        shutil.rmtree(final)
    os.replace(staged, final)
    _sync(folder)
    for old in committed(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path, fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and a line for each damaged one that was passed over.

    None where there never was one. Raises UserError when all are damaged, and when the
    checkpoint belongs to another configuration.
    """
    damaged: list[str] = []
    for path in reversed(committed(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            damaged_file = next(
                (
                    name
                    for name, expected in manifest["sha256"].items()
                    if not (path / name).is_file() or sha256_file(path / name) != expected
                ),
                None,
            )
        except (OSError, ValueError, KeyError):
            damaged.append(f"{path / MANIFEST}: the manifest is missing or malformed")
            continue
        if damaged_file is not None:
            damaged.append(
                f"{path / damaged_file}: missing, or its SHA-256 differs from the manifest's"
            )
            continue
        if manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: this checkpoint belongs to another configuration; restore that "
                "configuration, or choose another name or runs_dir"
            )
        return Checkpoint(path, int(manifest["step"]), manifest["state"]), damaged
    if damaged:
        raise UserError(
            f"{damaged[0]}; no earlier checkpoint is left to fall back on; delete {folder} to "
            "train from the start"
        )
    return None, damaged


def committed(folder: Path) -> list[Path]:
    """The folders of the committed checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk: the rename must not outlive the bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
