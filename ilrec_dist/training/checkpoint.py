"""Checkpoints: every rank's part, committed atomically with a SHA-256 manifest.

The parts are files of torch's distributed checkpoint in safetensors, without pickles:
`torch.distributed.checkpoint.load` reads the folder by a `HuggingFaceStorageReader`.
They are written beside the training, each by a thread of its rank; that of rank 0
waits for all of them and commits. A damaged checkpoint is passed over with a line that
names the file, and the one before it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import (
    put_in_place,
    read_json_object,
    sha256_file,
    sha256_files,
    write_json,
)
from ilrec_dist.common.manifest import with_checksum, without_checksum

MANIFEST = "manifest.json"
STAGING = ".writing-"
# Of what a checkpoint holds; another one cannot be read.
FORMAT = 4
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Layout:
    """What the tensors of a checkpoint are, as JSON values."""

    tp: int
    # Of the optimizer.
    step: float
    # Of the shards that the tensors are flattened from, by their names in the files.
    shapes: dict[str, list[int]]


@dataclass(frozen=True)
class Part:
    """What one rank writes, copied to host memory.

    tensors: elements of one-dimensional tensors of all ranks, from `starts` on.
    """

    tensors: dict[str, Tensor]
    starts: dict[str, int]
    layout: Layout


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    # What the trainer needs besides the parts.
    state: dict[str, Any]
    layout: Layout


def staging_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step is written before it is committed."""
    return folder / f"{STAGING}{step:08d}"


def make_staging_folder(staged: Path) -> None:
    """Make the folder, and remove what killed
    writers left beside it. One process calls this.
    """
    for leftover in staged.parent.glob(f"{STAGING}*"):
        shutil.rmtree(leftover)
    staged.mkdir(parents=True)


class CheckpointWriter:
    """Writes this rank's parts, one after the other, while the training goes on."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        keep: int,
        rank: int,
        world_size: int,
        timeout_seconds: float,
    ) -> None:
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, step: int, state: dict[str, Any], take_part: Callable[[], Part]) -> None:
        """Copy this rank's part, and begin to write it; a collective.

        `state` is read on rank 0. Raises what the checkpoint before has met.
        """
        # The one before must be committed on every rank before its leftovers may go.
        self.wait()
        dist.barrier()
        if self.rank == 0:
            make_staging_folder(staging_folder(self.folder, step))
        part = take_part()
        dist.barrier()

        def work() -> None:
            try:
                self._write(step, part)
                if self.rank == 0:
                    self._commit(step, state)
            except BaseException as error:
                # The training thread raises it.
                self._failure = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the last part, and on rank 0
        for the commit. Raises what went wrong.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, step: int, part: Part) -> None:
        staged = staging_folder(self.folder, step)
        path = staged / f"part-{self.rank:05d}.safetensors"
        write_part(part, path)
        # It says that the part is whole.
        mark = {"sha256": sha256_file(path), "layout": asdict(part.layout)}
        write_json(_mark(staged, self.rank), mark)

    def _commit(self, step: int, state: dict[str, Any]) -> None:
        """Wait for all parts, write the manifest, rename the folder into place."""
        staged = staging_folder(self.folder, step)
        until = time.monotonic() + self.timeout_seconds
        hashes, layouts = {}, []
        for rank in range(self.world_size):
            mark = _mark(staged, rank)
            while not mark.exists():
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"{staged}: rank {rank} did not write its part of the checkpoint within "
                        f"{self.timeout_seconds:g} s"
                    )
                time.sleep(POLL_SECONDS)
            written = read_json_object(mark)
            hashes[f"part-{rank:05d}.safetensors"] = written["sha256"]
            layouts.append(written["layout"])
            mark.unlink()
        manifest = staged / MANIFEST
        contents = {
            "format": FORMAT,
            "step": step,
            "fingerprint": self.fingerprint,
            "state": state,
            "layout": asdict(_joined(layouts)),
            "sha256": hashes,
        }
        write_json(manifest, with_checksum(contents))
        _sync(manifest)
        put_in_place(staged, self.folder / f"step-{step:08d}")
        _sync(self.folder)
        for old in _dropped(committed(self.folder), step, self.keep):
            shutil.rmtree(old, ignore_errors=True)


def _dropped(folders: Sequence[Path], step: int, keep: int) -> list[Path]:
    """Of the committed ones those that go once that of `step` is there.

    Later ones were passed over: they must not be kept in the place of whole ones.
    """
    passed_over = [path for path in folders if _step_of(path) > step]
    return passed_over + [path for path in folders if _step_of(path) <= step][:-keep]


def _mark(staged: Path, rank: int) -> Path:
    return staged / f"part-{rank:05d}.json"


def _joined(layouts: Sequence[Mapping[str, Any]]) -> Layout:
    """Of all ranks' parts together."""
    shapes = {name: shape for layout in layouts for name, shape in layout["shapes"].items()}
    return Layout(layouts[0]["tp"], max(layout["step"] for layout in layouts), shapes)


def write_part(part: Part, path: Path) -> None:
    """Write a part as torch's `HuggingFaceStorageWriter` would, and sync it.

    That one copies the file in memory twice before it writes any of it, and the
    training's thread stands still meanwhile; this one takes the tensors as they are.
    """
    offsets = {name: {"saved_offsets": [start]} for name, start in part.starts.items()}
    # torch has no public name for this key. Its writer adds others, which its reader does not need:
    # safetensors writes several in any order, and equal parts would have other hashes.
    save_file(part.tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    _sync(path)


def latest(folder: Path, fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and a line
    for each damaged one that was passed over.

    None where there never was one. Raises UserError when all are damaged, and when the
    checkpoint belongs to another configuration.
    """
    damaged: list[str] = []
    for path in reversed(committed(folder)):
        try:
            manifest = read_manifest(path / MANIFEST)
        except UserError:
            damaged.append(f"{path / MANIFEST}: missing, malformed, or not as it was written")
            continue
        if manifest["step"] != _step_of(path):
            damaged.append(f"{path / MANIFEST}: of step {manifest['step']}, so not of this folder")
            continue
        damaged_file = _damaged_file(path, manifest["sha256"])
        if damaged_file is not None:
            damaged.append(
                f"{path / damaged_file}: missing, unreadable, not of this checkpoint, or its "
                "SHA-256 differs from the manifest's"
            )
            continue
        if manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: this checkpoint belongs to another configuration; restore that "
                "configuration, or choose another name or runs_dir"
            )
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path}: written by another version of this project, which alone can go on from "
                f"it; delete {folder} to train from the start"
            )
        layout = Layout(**manifest["layout"])
        return Checkpoint(path, int(manifest["step"]), manifest["state"], layout), damaged
    if damaged:
        raise UserError(
            f"{damaged[0]}; no earlier checkpoint is left to fall back on; delete {folder} to "
            "train from the start"
        )
    return None, damaged


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises UserError where it is missing or damaged."""
    contents = without_checksum(read_json_object(path))
    if contents is None:
        raise UserError(f"{path}: not as it was written")
    return contents


def _damaged_file(path: Path, expected: dict[str, str]) -> str | None:
    """The first file that is missing or cannot be read, that no rank
    wrote but a reader would take for a part, or that has another hash.

    They are hashed in parallel.
    """
    files = {file.name for file in path.glob("*.safetensors")}
    wrong = min(files ^ expected.keys(), default=None)
    if wrong is not None:
        return wrong
    hashes = sha256_files(path, expected, _hash_or_nothing)
    return next((name for name in expected if hashes[name] != expected[name]), None)


def _hash_or_nothing(path: Path) -> str:
    """Empty where it cannot be read: its disk may be what is damaged."""
    try:
        return sha256_file(path)
    except OSError:
        return ""


def committed(folder: Path) -> list[Path]:
    """The folders of the committed checkpoints, the oldest first.

    Folders of other names, such as somebody's copy of one, are left alone.
    """
    numbered = (path for path in folder.glob("step-*") if path.name[5:].isdecimal())
    return sorted((path for path in numbered if path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to
    disk: the rename must not outlive the bytes.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
