"""One-dimensional tensors of a checkpoint in the files
of torch's distributed checkpoint, read by ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Range:
    """Elements [start, start + n) of the named tensor, to be put into `values` [n]."""

    name: str
    start: int
    values: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), self.values.shape)


class SavedTensors:
    """All tensors of a folder, whichever ranks have written their chunks."""

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: tensor
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }

    def read(self, ranges: Sequence[Range]) -> None:
        """Fill the ranges. Each file is opened once, and one chunk copied at a time."""
        items = [
            item
            for wanted in ranges
            for item in create_read_items_for_chunk_list(
                wanted.name, self._tensors[wanted.name], [wanted.chunk]
            )
        ]
        self._reader.read_data(LoadPlan(items), _IntoRanges(ranges)).wait()


class _IntoRanges(DefaultLoadPlanner):
    """Tells the reader where each range is wanted."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        super().__init__()
        self._values = {
            MetadataIndex(wanted.name, wanted.chunk.offsets): wanted.values for wanted in ranges
        }

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._values[index]
