"""Which rows or columns of a checkpoint's tensors are a rank's shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.sharding import ShardSpec, shard_spec


@dataclass(frozen=True)
class Slice:
    """[start, stop) along `dim` of one of a parameter's checkpoint tensors."""

    # An index into families.checkpoint_names.
    tensor: int
    dim: int
    start: int
    stop: int


def tensor_shapes(name: str, full: list[int], config: BackboneConfig) -> list[list[int]]:
    """The shapes of the checkpoint's tensors of a parameter of full shape `full`."""
    rows, columns = full[0], full[1:]
    if "linear_qkv." in name:
        heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
        head_dim = rows // (heads + 2 * groups)
        return [
            [heads * head_dim, *columns],
            [groups * head_dim, *columns],
            [groups * head_dim, *columns],
        ]
    if "linear_fc1." in name:
        return [[rows // 2, *columns]] * 2
    return [full]


def shard_slices(
    name: str, full: list[int], config: BackboneConfig, rank: int, tp: int
) -> list[Slice]:
    """The slices that, concatenated along `dim`, are a rank's shard of a parameter.

    full: the parameter's shape over all ranks. Rows of the vocabulary may exceed the
    checkpoint's.
    """
    spec = shard_spec(name, config)
    if spec is None:
        return [Slice(0, 0, 0, full[0])]
    if "linear_qkv." in name:
        size = full[0] // tp
        return list(_joint_rows(full[0], config, rank * size, (rank + 1) * size))
    return _even_slices(spec, full, rank, tp)


def _even_slices(spec: ShardSpec, full: list[int], rank: int, tp: int) -> list[Slice]:
    size = full[spec.dim] // spec.parts // tp
    return [Slice(part, spec.dim, rank * size, (rank + 1) * size) for part in range(spec.parts)]


def _joint_rows(rows: int, config: BackboneConfig, start: int, stop: int) -> Iterator[Slice]:
    """Rows [start, stop) of the joint projection: per group queries, key, value."""
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    head_dim = rows // (heads + 2 * groups)
    position = 0
    for group in range(groups):
        for tensor, size in enumerate((heads // groups * head_dim, head_dim, head_dim)):
            first, last = max(start, position), min(stop, position + size)
            if first < last:
                offset = group * size - position
                yield Slice(tensor, 0, first + offset, last + offset)
            position += size
