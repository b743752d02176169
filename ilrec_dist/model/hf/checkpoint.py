"""Hugging Face checkpoints in and out under any tp; no rank holds the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError
from torch import Tensor

from ilrec_dist.common.disk import not_writable
from ilrec_dist.common.errors import NotWritable, UserError
from ilrec_dist.common.files import committed_folder, read_json_object, write_json
from ilrec_dist.distributed.layout import from_rank0
from ilrec_dist.model import sharding
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.families import (
    checkpoint_names,
    config_json,
    family_of_config,
    family_of_json,
)
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.hf.slices import Slice, shard_slices, tensor_shapes
from ilrec_dist.model.hf.tensor_files import TensorReader, TensorWriter

# Bytes of a safetensors file that `save_weights` writes; rank 0 holds the tensors of one file.
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class CheckpointPlan:
    """What a folder's tensors are to a backbone: by the backbone's parameter, the names
    of its tensors and its full shape.
    """

    reader: TensorReader
    # The rows that config.json gives to the vocabulary tables.
    vocab_rows: int
    parameters: dict[str, tuple[list[str], list[int]]]


def plan_checkpoint(backbone: Backbone, folder: str | Path) -> CheckpointPlan:
    """Find a backbone's tensors in a Hugging Face folder, of which headers are read.

    Sets the backbone's family. UserError as in `load_weights`.
    """
    path = Path(folder) / "config.json"
    tree = read_json_object(path)
    backbone.checkpoint_family = family_of_json(tree, path).model_type
    reader, rows = TensorReader(Path(folder)), tree["vocab_size"]
    parameters = {
        name: _plan(backbone, name, parameter, reader, rows)
        for name, parameter in backbone.gpt.named_parameters()
    }
    return CheckpointPlan(reader, rows, parameters)


@torch.no_grad()
def load_weights(backbone: Backbone, folder: str | Path, new_rows: NewRows | None = None) -> None:
    """Fill the backbone from a folder whose `read_config` gave its configuration.

    Every rank reads its own slices only. Rows of the vocabulary beyond the checkpoint's
    (padding) are drawn anew from the backbone's seed, and those of `new_rows` as it
    says, whether the checkpoint has them or not; equally for every tp. UserError names
    the file and the tensor that is missing, damaged or of another shape; every rank
    raises the same one, before it has read any weights.
    """
    plan = plan_checkpoint(backbone, folder)
    reader, tp, rank = plan.reader, backbone.tp_group.size(), backbone.tp_group.rank()
    for name, parameter in backbone.gpt.named_parameters():
        keys, full = plan.parameters[name]
        backbone.checkpoint_dtypes[name] = reader.entry(keys[0]).dtype
        if sharding.is_vocabulary(name):
            _load_vocabulary(backbone, name, parameter, reader, keys[0], full)
            if new_rows is not None:
                _draw_rows(backbone, name, parameter, reader, keys[0], new_rows)
            continue
        offset = 0
        for part in shard_slices(name, full, backbone.config, rank, tp):
            size = part.stop - part.start
            values = reader.read(keys[part.tensor], part.dim, part.start, part.stop)
            parameter.narrow(part.dim, offset, size).copy_(values)
            offset += size


def save_weights(
    backbone: Backbone,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    token_ids: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` loads, vocabulary unpadded; a collective.

    dtype: None writes each tensor in the dtype in which `load_weights` read it, so that
    an untouched weight comes out byte for byte, and in the parameter's own dtype where
    none was read. token_ids: the special tokens' ids of `Pretrained`. Tensors go to
    rank 0 one by one, and it writes them in files of about shard_bytes. `folder` must
    not exist, and appears whole or not at all. generation_config.json asks for greedy
    decoding and nothing else. UserError, on every rank, when no family has this
    architecture or the folder cannot be written.
    """
    folder, is_rank0 = Path(folder), dist.get_rank() == 0
    backbone.write_trained_rows()
    # An architecture of no family is refused before anything is written.
    family_of_config(backbone.config, backbone.checkpoint_family)
    problem: UserError | NotWritable | None = None
    with ExitStack() as stack:
        if is_rank0:
            try:
                if folder.exists():
                    raise FileExistsError("already exists; choose a folder to create")
                staged = stack.enter_context(committed_folder(folder))
            except (OSError, NotWritable) as error:
                problem = not_writable(error, folder) or UserError(f"{folder}: {error}")
        raise_everywhere(problem)
        writer = TensorWriter(staged, shard_bytes) if is_rank0 else None
        if parallel_state.get_data_parallel_rank() == 0:
            for name, parameter in backbone.gpt.named_parameters():
                tensors = _checkpoint_tensors(backbone, name, parameter, dtype)
                if writer is not None:
                    writer.add(tensors)
        if writer is not None:
            try:
                writer.close()
                write_config(staged, backbone, _written_dtype(backbone, dtype), token_ids or {})
                stack.close()
            except (OSError, SafetensorError, NotWritable) as error:
                problem = not_writable(error, folder) or UserError(
                    f"{folder}: cannot be written ({error})"
                )
                # The staged folder goes, which raises what became of the error once more.
                with suppress(NotWritable):
                    stack.pop_all().__exit__(type(error), error, error.__traceback__)
    raise_everywhere(problem)


def _plan(
    backbone: Backbone, name: str, parameter: Tensor, reader: TensorReader, vocab_rows: int
) -> tuple[list[str], list[int]]:
    """The checkpoint's tensors of a parameter, checked, and its full shape.

    vocab_rows: the rows that config.json gives to the checkpoint's vocabulary tables.
    """
    keys = checkpoint_names(name, family_of_config(backbone.config, backbone.checkpoint_family))
    spec = sharding.shard_spec(name, backbone.config)
    full = sharding.full_shape(parameter.shape, spec, backbone.tp_group.size())
    for key, shape in zip(keys, tensor_shapes(name, full, backbone.config), strict=True):
        if sharding.is_vocabulary(name):
            # The backbone's table may have more: padding, and rows of added tokens.
            shape = [min(vocab_rows, backbone.vocab_size), *shape[1:]]
        reader.require(key, shape)
    return keys, full


def _load_vocabulary(
    backbone: Backbone,
    name: str,
    parameter: Tensor,
    reader: TensorReader,
    key: str,
    full: list[int],
) -> None:
    """Read this rank's rows of the vocabulary, and draw those that are new."""
    start, stop = backbone.vocab_range
    rows = reader.entry(key).shape[0]
    present = max(0, min(stop, rows) - start)
    if present:
        parameter[:present].copy_(reader.read(key, 0, start, start + present))
    if stop > rows:
        shape = [full[0] - rows, full[1]]
        new = sharding.init_tensor(f"{name}/new rows", shape, backbone.config, backbone.seed)
        parameter[present:].copy_(new[start + present - rows : stop - rows])


def _draw_rows(
    backbone: Backbone,
    name: str,
    parameter: Tensor,
    reader: TensorReader,
    key: str,
    new_rows: NewRows,
) -> None:
    """Fill this rank's part of the new rows."""
    start, stop = backbone.vocab_range
    first, last = max(start, new_rows.start), min(stop, new_rows.stop)
    if first < last:
        drawn = new_rows.draw(reader, key, name, backbone.seed, first, last)
        parameter[first - start : last - start].copy_(drawn)


def _checkpoint_tensors(
    backbone: Backbone, name: str, parameter: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The checkpoint's tensors of one parameter, on rank 0 only; a collective."""
    config, tp = backbone.config, backbone.tp_group.size()
    shard = parameter.detach().to(_tensor_dtype(backbone, name, parameter, dtype)).contiguous()
    spec = sharding.shard_spec(name, config)
    shards = [shard] if spec is None else gather_to_first(shard, backbone.tp_group)
    if not shards or backbone.tp_group.rank() != 0:
        return {}
    full = sharding.full_shape(parameter.shape, spec, tp)
    tensors = [torch.empty(s, dtype=shard.dtype) for s in tensor_shapes(name, full, config)]
    for rank, part in enumerate(shards):
        _scatter(part, shard_slices(name, full, config, rank, tp), tensors)
    if sharding.is_vocabulary(name):
        tensors = [tensors[0][: backbone.vocab_size]]
    family = family_of_config(config, backbone.checkpoint_family)
    return dict(zip(checkpoint_names(name, family), tensors, strict=True))


def _scatter(shard: Tensor, slices: list[Slice], tensors: list[Tensor]) -> None:
    """Copy a rank's shard to its places in the checkpoint's tensors."""
    offset = 0
    for part in slices:
        size = part.stop - part.start
        target = tensors[part.tensor].narrow(part.dim, part.start, size)
        target.copy_(shard.narrow(part.dim, offset, size))
        offset += size


def gather_to_first(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """All shards in rank order on the group's first rank, none on the others."""
    if group.size() == 1:
        return [shard]
    # Bytes, because gloo does not know every dtype.
    data = shard.view(torch.uint8)
    shards = [torch.empty_like(data) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(data, shards, group=group, group_dst=0)
    return [part.view(shard.dtype) for part in shards or []]


def gather_rows_to_first(shard: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in rank order on the group's
    first rank, the rank's own on the others.

    counts: the number of rows of each rank, which may differ.
    """
    padded = shard.new_zeros((max(counts), shard.shape[1]))
    padded[: len(shard)] = shard
    shards = gather_to_first(padded, group)
    if not shards:
        return shard
    return torch.cat([part[:count] for part, count in zip(shards, counts, strict=True)])


def _tensor_dtype(
    backbone: Backbone, name: str, parameter: Tensor, dtype: torch.dtype | None
) -> torch.dtype:
    return dtype or backbone.checkpoint_dtypes.get(name, parameter.dtype)


def _written_dtype(backbone: Backbone, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that config.json names: that of the embedding."""
    name, parameter = next(iter(backbone.gpt.named_parameters()))
    return _tensor_dtype(backbone, name, parameter, dtype)


def write_config(
    folder: Path, backbone: Backbone, dtype: torch.dtype, token_ids: Mapping[str, Any]
) -> None:
    """Write config.json and generation_config.json of a backbone's checkpoint.

    UserError when no family has this architecture.
    """
    family = family_of_config(backbone.config, backbone.checkpoint_family)
    tree = config_json(backbone.config, family, backbone.vocab_size, backbone.max_positions)
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**tree, **token_ids, "dtype": name, "torch_dtype": name})
    write_json(folder / "generation_config.json", {"do_sample": False, "num_beams": 1, **token_ids})


def raise_everywhere(problem: UserError | NotWritable | None) -> None:
    """Raise rank 0's problem on every rank; a collective over all ranks."""
    met: UserError | NotWritable | None = from_rank0(problem)
    if met is not None:
        raise met
