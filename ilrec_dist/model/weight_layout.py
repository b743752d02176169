"""How weights lie in files: what each rank writes, the index, and what each rank reads.

The index is that of Hugging Face's sharded checkpoints. A tensor that tensor-parallel
ranks hold in pieces is in it piece by piece, `NAME.shard-00001-of-00002`, and the
index's metadata have the whole shape, the dimension along which it is cut, and the
number of parts of that dimension that are cut each by itself (`ShardSpec`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.common.files import read_json_object
from ilrec_dist.model.hf.tensor_files import INDEX_FILE
from ilrec_dist.model.sharding import ShardSpec

# Bytes of a file, where no tensor is larger.
FILE_BYTES = 512 << 20
FP32_BYTES = 4


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the files hold it."""

    # Of the whole tensor.
    shape: list[int]
    # How its pieces are cut; None where it is in one piece.
    spec: ShardSpec | None = None
    element_bytes: int = FP32_BYTES

    def pieces(self, tp: int) -> int:
        return 1 if self.spec is None else tp

    def piece_bytes(self, tp: int) -> int:
        return self.element_bytes * math.prod(self.shape) // self.pieces(tp)


@dataclass(frozen=True)
class PlannedFile:
    """A file, the rank that writes it, and the pieces in it: parameter → name."""

    name: str
    tp_rank: int
    dp_rank: int
    pieces: dict[str, str]


@dataclass(frozen=True)
class PieceSlice:
    """[start, stop) along `dim` of a tensor's piece,
    and where that begins in a rank's parameter.
    """

    piece: int
    dim: int
    start: int
    stop: int
    target: int


def plan_files(tensors: Mapping[str, StoredTensor], tp: int, dp: int) -> list[PlannedFile]:
    """The files of all ranks; every rank reckons the same.

    A tensor in one piece is written by the first rank of
    the tp group. The data-parallel ranks share out the files.
    """
    groups: list[tuple[int, int, dict[str, str]]] = []
    for rank in range(tp):
        mine = {name: tensor for name, tensor in tensors.items() if rank < tensor.pieces(tp)}
        total = sum(tensor.piece_bytes(tp) for tensor in mine.values())
        limit = min(FILE_BYTES, -(-total // dp))
        files: list[dict[str, str]] = []
        free = 0
        for name, tensor in mine.items():
            if not files or tensor.piece_bytes(tp) > free:
                files.append({})
                free = limit
            files[-1][name] = piece_name(name, rank, tensor.pieces(tp))
            free -= tensor.piece_bytes(tp)
        groups += [(rank, number % dp, pieces) for number, pieces in enumerate(files)]
    return [
        PlannedFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", *group)
        for number, group in enumerate(groups, start=1)
    ]


def piece_name(name: str, rank: int, pieces: int) -> str:
    return name if pieces == 1 else f"{name}.shard-{rank + 1:05d}-of-{pieces:05d}"


def index_of(
    tensors: Mapping[str, StoredTensor], tp: int, files: Sequence[PlannedFile]
) -> dict[str, Any]:
    """What the index file holds."""
    described: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        described[name] = {"shape": tensor.shape}
        if tensor.spec is not None:
            described[name] |= {"dim": tensor.spec.dim, "parts": tensor.spec.parts}
    total = sum(tensor.piece_bytes(tp) * tensor.pieces(tp) for tensor in tensors.values())
    return {
        "metadata": {"total_size": total, "tp": tp, "tensors": described},
        "weight_map": {key: file.name for file in files for key in file.pieces.values()},
    }


@dataclass(frozen=True)
class StoredWeights:
    """A folder of weights as its index describes it."""

    tp: int
    tensors: dict[str, StoredTensor]
    # Name of a piece → name of its file.
    files: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> StoredWeights:
        """Read the index, whose bytes the caller has compared with their hash."""
        index = read_json_object(folder / INDEX_FILE)
        tensors = {
            name: StoredTensor(
                entry["shape"], ShardSpec(entry["dim"], entry["parts"]) if "dim" in entry else None
            )
            for name, entry in index["metadata"]["tensors"].items()
        }
        return cls(index["metadata"]["tp"], tensors, index["weight_map"])

    def piece(self, name: str, number: int) -> tuple[str, str]:
        """The name of a tensor's piece, and of its file."""
        key = piece_name(name, number, self.tensors[name].pieces(self.tp))
        return key, self.files[key]


def slices(
    shape: Sequence[int], spec: ShardSpec | None, pieces: int, rank: int, tp: int
) -> Iterator[PieceSlice]:
    """What a rank of a tp group reads of a tensor that is stored in `pieces`.

    shape: of the whole tensor; spec: how it is cut over
    ranks, None where every rank holds it whole.
    """
    if spec is None:
        yield PieceSlice(0, 0, 0, shape[0], 0)
        return
    size = shape[spec.dim] // spec.parts
    mine, theirs = size // tp, size // pieces
    low, high = rank * mine, (rank + 1) * mine
    for part in range(spec.parts):
        for piece in range(low // theirs, -(-high // theirs)):
            begin = piece * theirs
            start, stop = max(low, begin), min(high, begin + theirs)
            offset, target = part * theirs - begin, part * mine - low
            yield PieceSlice(piece, spec.dim, start + offset, stop + offset, start + target)
