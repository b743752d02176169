"""The tensors of an export, made from a training's files some rows at a time.

Nothing here holds a model: each class knows the names and shapes of the tensors that
are to be written, and reads the files where a block of rows is asked for. The backbones
that tell of names and shapes have no values (`empty_shapes`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import CheckpointPlan
from ilrec_dist.model.hf.families import checkpoint_names, family_of_config
from ilrec_dist.model.hf.peft import PREFIX, TABLES, tensor_name
from ilrec_dist.model.hf.slices import shard_slices, tensor_shapes
from ilrec_dist.model.hf.tensor_files import read_slice
from ilrec_dist.model.lora import Lora
from ilrec_dist.model.partial import ROWS
from ilrec_dist.model.sharding import is_vocabulary
from ilrec_dist.model.trained_rows import EMBEDDING, HEAD
from ilrec_dist.model.weight_layout import slices
from ilrec_dist.model.weights import require_finite, verified_partial, verified_weights


class _Run(NamedTuple):
    """Rows of a parameter, from `offset` on, that are a tensor's [start, stop)."""

    parameter: str
    offset: int
    start: int
    stop: int


class StoredTensors:
    """The checkpoint's tensors of a training of all weights, whatever its tp was.

    UserError as in `load_training_weights`, and where no Hugging Face family has the
    backbone's architecture.
    """

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        family = family_of_config(backbone.config, backbone.checkpoint_family)
        self.folder, self.stored = folder, verified_weights(backbone, folder)
        self.shapes: dict[str, list[int]] = {}
        self._runs: dict[str, list[_Run]] = defaultdict(list)
        for name, tensor in self.stored.tensors.items():
            keys = checkpoint_names(name, family)
            shapes = tensor_shapes(name, tensor.shape, backbone.config)
            if is_vocabulary(name):
                # Without the padding.
                shapes = [[backbone.vocab_size, *tensor.shape[1:]]]
            self.shapes |= dict(zip(keys, shapes, strict=True))
            offset = 0
            for part in shard_slices(name, tensor.shape, backbone.config, 0, 1):
                # A tensor that ranks cut by columns has all rows in one slice.
                start, stop = (part.start, part.stop) if part.dim == 0 else (0, tensor.shape[0])
                self._runs[keys[part.tensor]].append(_Run(name, offset, start, stop))
                offset += stop - start

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the dtype in which they are stored."""
        blocks = []
        for run in self._runs[key]:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                shift = run.offset - run.start
                blocks += self._parameter_rows(run.parameter, first + shift, last + shift)
        values = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        require_finite(key, values, self.folder)
        return values

    def _parameter_rows(self, name: str, start: int, stop: int) -> list[Tensor]:
        """Blocks of rows that are [start, stop) of a parameter one after the other."""
        tensor = self.stored.tensors[name]
        blocks, columns = [], []
        pieces = tensor.pieces(self.stored.tp)
        for part in slices(tensor.shape, tensor.spec, pieces, 0, 1):
            key, file = self.stored.piece(name, part.piece)
            path = self.folder / file
            if part.dim == 1:
                columns.append(read_slice(path, key, 0, start, stop)[:, part.start : part.stop])
                continue
            first = max(start, part.target)
            last = min(stop, part.target + part.stop - part.start)
            if first < last:
                shift = part.start - part.target
                blocks.append(read_slice(path, key, 0, first + shift, last + shift))
        return [torch.cat(columns, dim=1)] if columns else blocks


class MergedTensors:
    """The checkpoint's tensors of a pretrained model with what was trained beside it:
    adapters added in fp32, and rows of added tokens.

    plan: of the pretrained model. UserError as in `load_training_weights`.
    """

    def __init__(self, backbone: Backbone, plan: CheckpointPlan, folder: Path) -> None:
        self.trained = verified_partial(backbone, folder)
        self.base, self.added_rows = plan.reader, backbone.added_rows
        self.lora = backbone.lora if isinstance(backbone.lora, Lora) else None
        self.shapes: dict[str, list[int]] = {}
        self._tables: dict[str, str] = {}
        for name, (keys, full) in plan.parameters.items():
            shapes = tensor_shapes(name, full, backbone.config)
            if is_vocabulary(name):
                shapes = [[backbone.vocab_size, *full[1:]]]
                self._tables[keys[0]] = HEAD if name.startswith("output_layer.") else EMBEDDING
            self.shapes |= dict(zip(keys, shapes, strict=True))
        layers = self.lora.linears() if self.lora is not None else ()
        self._adapted = {
            f"{module}.weight": module for layer in layers for _, module in layer.targeted()
        }

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop): fp32 where an adapter is added, else as they are
        stored.
        """
        values = self.rows_without_adapters(key, start, stop)
        if self.lora is None or key not in self._adapted:
            return values
        names = [tensor_name(self._adapted[key], factor) for factor in "AB"]
        a = self.trained.read(names[0], 0, 0, self.lora.config.rank)
        b = self.trained.read(names[1], 0, start, stop)
        return values.float() + (b.float() @ a.float()) * self.lora.config.scaling

    def rows_without_adapters(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the model with its added tokens alone."""
        if key not in self._tables:
            return self.base.read(key, 0, start, stop)
        low, high = self.added_rows
        blocks = []
        for first, last in ((start, min(stop, low)), (max(start, high), stop)):
            if first < last:
                blocks.append(self.base.read(key, 0, first, last))
        first, last = max(start, low), min(stop, high)
        if first < last:
            new = self.trained.read(ROWS + self._tables[key], 0, first - low, last - low)
            blocks.insert(int(start < low), new)
        common = torch.promote_types(blocks[0].dtype, blocks[-1].dtype)
        return torch.cat([block.to(common) for block in blocks])


class AdapterTensors:
    """Adapters and rows of added tokens, by PEFT's names.

    UserError as in `load_training_weights`.
    """

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        self.trained = verified_partial(backbone, folder)
        self._stored = {
            f"{PREFIX}{TABLES[name.removeprefix(ROWS)]}.token_adapter.trainable_tokens_delta"
            if name.startswith(ROWS)
            else name: name
            for name in self.trained.entries
        }
        self.shapes = {key: self.trained.entry(name).shape for key, name in self._stored.items()}

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the dtype in which they are stored."""
        return self.trained.read(self._stored[key], 0, start, stop)
