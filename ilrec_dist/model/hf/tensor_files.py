"""The safetensors files of a model folder: read by slices, written file by file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Bytes of rows that `write_tensors` holds at a time, where no row is larger.
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint as its file's header describes it."""

    path: Path
    shape: list[int]
    dtype: torch.dtype


def read_slice(path: Path, key: str, dim: int, start: int, stop: int) -> Tensor:
    """[start, stop) along `dim`, 0 or 1, of a tensor of a file, in the file's dtype.

    The file is mapped for this call only, so that pages already read do not count as
    memory of this process for longer. UserError where it is not whole safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(key)
            result: Tensor = part[start:stop] if dim == 0 else part[:, start:stop]
            return result
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


class TensorReader:
    """Reads slices of a folder's tensors, from one file or several and an index.

    Only headers are read at first. UserError names a file that is missing, truncated or
    malformed, and a tensor that the index promises and its file lacks.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        self.folder, self.single_file = folder, single_file
        self.entries: dict[str, TensorEntry] = {}
        weight_map = self._weight_map()
        for name in sorted(set(weight_map.values())) if weight_map is not None else [single_file]:
            self._read_header(folder / name)
        for key, name in (weight_map or {}).items():
            if key not in self.entries or self.entries[key].path.name != name:
                raise UserError(
                    f"{folder / name}: tensor {key!r} is missing, though {INDEX_FILE} lists it"
                )

    def entry(self, key: str) -> TensorEntry:
        """The tensor's description; UserError where it is missing."""
        if key not in self.entries:
            name = INDEX_FILE if self.has_index else self.single_file
            raise UserError(f"{self.folder / name}: tensor {key!r} is missing")
        return self.entries[key]

    def require(self, key: str, shape: Sequence[int]) -> None:
        """Raise UserError where a tensor is missing or has another shape."""
        entry = self.entry(key)
        if entry.shape != list(shape):
            raise UserError(
                f"{entry.path}: tensor {key!r} has shape {entry.shape}, expected {list(shape)}; is "
                "it the folder of this configuration?"
            )

    def read(self, key: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) of a tensor along `dim`, 0 or 1, in the file's dtype.

        Mapped as by `read_slice`.
        """
        return read_slice(self.entry(key).path, key, dim, start, stop)

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor → file name by the index; None without an index."""
        index = self.folder / INDEX_FILE
        self.has_index = self.single_file == SINGLE_FILE and index.exists()
        if not self.has_index:
            return None
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise UserError(
                f"{index}: malformed; expected an object weight_map from tensors to file names"
            )
        return weight_map

    def _read_header(self, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"{path}: no such file; expected the safetensors of a Hugging Face model"
            )
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    kind = part.get_dtype()
                    if kind in DTYPES:
                        self.entries[key] = TensorEntry(path, list(part.get_shape()), DTYPES[kind])
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: cannot be read as safetensors ({error}); is it truncated or damaged?"
            ) from None


class TensorRows(Protocol):
    """Tensors that are made some rows at a time, by their names."""

    shapes: dict[str, list[int]]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU, of any dtype."""


def row_blocks(shape: Sequence[int], element_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows that have about BLOCK_BYTES each."""
    size = max(1, BLOCK_BYTES // max(1, element_bytes * math.prod(shape[1:])))
    for start in range(0, shape[0], size):
        yield start, min(start + size, shape[0])


def write_tensors(
    tensors: TensorRows,
    folder: Path,
    dtype: torch.dtype,
    max_bytes: int | None = None,
    single_file: str = SINGLE_FILE,
) -> None:
    """Write tensors to safetensors files, one after the other, and their index last.

    A file has at most max_bytes, where no tensor is larger; None stands for one file.
    It is written a block of rows at a time. A single file is named single_file and gets
    no index. Raises OSError where it cannot be written.
    """
    files: list[list[str]] = [[]]
    free = math.inf if max_bytes is None else max_bytes
    sizes = {key: dtype.itemsize * math.prod(shape) for key, shape in tensors.shapes.items()}
    for key, size in sizes.items():
        if files[-1] and size > free:
            files.append([])
            free = math.inf if max_bytes is None else max_bytes
        files[-1].append(key)
        free -= size
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(files):
        name = shard_name(number, len(files)) if len(files) > 1 else single_file
        _write_file(folder / name, tensors, keys, dtype)
        weight_map |= dict.fromkeys(keys, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)


def shard_name(number: int, count: int) -> str:
    """The name of a model's file, `number` from 0 on, of `count` files."""
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_file(path: Path, tensors: TensorRows, keys: Sequence[str], dtype: torch.dtype) -> None:
    (code,) = (code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        end = offset + dtype.itemsize * math.prod(tensors.shapes[key])
        shape = tensors.shapes[key]
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # The format aligns the arrays.
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            for start, stop in row_blocks(tensors.shapes[key], torch.float32.itemsize):
                block = tensors.rows(key, start, stop).to(dtype).contiguous()
                file.write(block.view(torch.uint8).numpy().data)


class TensorWriter:
    """Writes tensors to safetensors files of about max_bytes each, and their index.

    Holds the tensors of one file at a time. After a failure `add` drops what it is
    given and `close` raises the failure (OSError or SafetensorError), so that the ranks
    that send the tensors can go on.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.files: list[list[str]] = []
        self.failure: Exception | None = None

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take contiguous CPU tensors; write a file before they exceed its size."""
        for key, tensor in tensors.items():
            if self.failure is not None:
                return
            if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
                self._flush()
            self.pending[key] = tensor
            self.pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left and the index; a single file gets no index."""
        if self.failure is None:
            self._flush()
        if self.failure is not None:
            raise self.failure
        count = len(self.files)
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self.files):
            name = shard_name(number, count)
            self._path(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number}"

    def _flush(self) -> None:
        try:
            save_file(self.pending, self._path(len(self.files)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            self.failure = error
        self.files.append(list(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0
