"""Trainings that leave a pretrained model's own weights as they are (METHOD.md §10).

What is trained is LoRA adapters, the rows of the added item tokens, or both. Such a
training's folder of weights holds these alone, and the SHA-256 of the pretrained
weights stands beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import from_rank0, is_rank0
from ilrec_dist.model.config import LoraConfig, Trainable
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.peft import (
    adapter_shapes,
    adapter_tensors,
    added_row_tensors,
    local_added_rows,
    read_adapter,
)
from ilrec_dist.model.hf.source import weights_sha256
from ilrec_dist.model.hf.tensor_files import TensorReader
from ilrec_dist.model.lora import Lora, add_lora
from ilrec_dist.model.trained_rows import TrainedRows

# The rows of the added tokens, among a training's weights.
ROWS = "new_rows."


def train_partially(
    backbone: Backbone,
    trainable: Trainable,
    lora: LoraConfig,
    base: str | Path,
    added_rows: tuple[int, int],
    seed: int,
) -> None:
    """Freeze the backbone's weights and attach what
    `trainable` names; collective over all ranks.

    base: the folder that the weights were read from. added_rows:
    the range of the tokens that were added to the model's own.
    """
    backbone.base_sha256 = from_rank0(weights_sha256(base) if is_rank0() else "")
    backbone.added_rows = added_rows
    if trainable.startswith("lora"):
        add_lora(backbone, lora, seed)
    backbone.gpt.requires_grad_(False)
    if trainable.endswith("new_rows"):
        separate_rows(backbone, added_rows)


def separate_rows(backbone: Backbone, rows: tuple[int, int]) -> None:
    """Make these rows of the vocabulary parameters of their own."""
    backbone.trained_rows = TrainedRows(
        backbone.vocabulary_tables, backbone.vocab_range, backbone.padded_vocab_size, *rows
    )


def partial_state_dict(backbone: Backbone) -> dict[str, Tensor]:
    """Adapters by PEFT's names, and all rows of
    added tokens; on rank 0, on others empty.

    Collective over the tensor-parallel group of the first data-parallel rank.
    """
    if parallel_state.get_data_parallel_rank() != 0:
        return {}
    adapters = backbone.lora
    tensors = adapter_tensors(adapters) if isinstance(adapters, Lora) else {}
    return tensors | {ROWS + name: rows for name, rows in added_row_tensors(backbone).items()}


@torch.no_grad()
def load_partial(backbone: Backbone, folder: Path) -> None:
    """Fill what `train_partially` attached from a
    folder of weights, of which each rank reads its part.

    UserError as in `partial_reader`.
    """
    reader, adapters = partial_reader(backbone, folder), backbone.lora
    if isinstance(adapters, Lora):
        read_adapter(adapters, reader)
    tables = backbone.vocabulary_tables
    low, high = local_added_rows(backbone, backbone.tp_group.rank())
    first = backbone.vocab_range[0] - backbone.added_rows[0]
    if high > low:
        for name, table in tables.items():
            table[low:high] = reader.read(ROWS + name, 0, low + first, high + first)
    if backbone.trained_rows is not None:
        backbone.trained_rows.read_from(tables)


def partial_reader(backbone: Backbone, folder: Path) -> TensorReader:
    """Open the weights of a training that `train_partially` began.

    UserError names a tensor that is missing, left over or of another shape.
    """
    reader, adapters = TensorReader(folder), backbone.lora
    shapes = adapter_shapes(adapters) if isinstance(adapters, Lora) else {}
    start, stop = backbone.added_rows
    tables = backbone.vocabulary_tables
    if stop > start:
        shapes |= {ROWS + name: [stop - start, table.shape[1]] for name, table in tables.items()}
    for name in sorted(shapes.keys() | reader.entries.keys()):
        shape = reader.entries[name].shape if name in reader.entries else None
        if shape != shapes.get(name):
            raise UserError(
                f"{folder}: tensor {name!r} has shape {shape}, expected {shapes.get(name)}; is it "
                "of another configuration?"
            )
    return reader
