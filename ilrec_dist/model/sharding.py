"""Weights that do not depend on tp: how they are cut and initialised."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_dist.model.config import BackboneConfig


@dataclass(frozen=True)
class ShardSpec:
    """How a tensor is cut over the tensor-parallel ranks.

    Each of `parts` equal parts along `dim` is cut by itself: rank r holds [part1_r;
    part2_r].
    """

    dim: int
    parts: int = 1

    def slice(self, full: Tensor, rank: int, tp: int) -> Tensor:
        """The shard of one rank, from the full tensor."""
        if tp == 1:
            return full
        return torch.cat(
            [part.chunk(tp, self.dim)[rank] for part in full.chunk(self.parts, self.dim)], self.dim
        )

    def join(self, shards: list[Tensor]) -> Tensor:
        """The full tensor from the shards in rank order; the inverse of `slice`."""
        if len(shards) == 1:
            return shards[0]
        parts = zip(*(shard.chunk(self.parts, self.dim) for shard in shards), strict=True)
        return torch.cat([torch.cat(part, self.dim) for part in parts], self.dim)


@dataclass(frozen=True)
class RowRangeSpec(ShardSpec):
    """How the rows [start, stop) of a table are cut, which itself is cut evenly.

    A rank has those of its own part of the table's `table_rows`, and where there are
    none one row of zeros.
    """

    dim: int = 0
    start: int = 0
    stop: int = 0
    table_rows: int = 0

    def _owned(self, rank: int, tp: int) -> tuple[int, int]:
        """This rank's of the rows, counted from the first one."""
        low, high = self.table_rows * rank // tp, self.table_rows * (rank + 1) // tp
        return max(self.start, low) - self.start, min(self.stop, high) - self.start

    def slice(self, full: Tensor, rank: int, tp: int) -> Tensor:
        """The shard of one rank, from all rows."""
        low, high = self._owned(rank, tp)
        return full[low:high] if low < high else full.new_zeros(1, *full.shape[1:])

    def join(self, shards: list[Tensor]) -> Tensor:
        """All rows from the shards in rank order."""
        owned = [self._owned(rank, len(shards)) for rank in range(len(shards))]
        pairs = zip(shards, owned, strict=True)
        return torch.cat([shard for shard, (low, high) in pairs if low < high])


def is_vocabulary(name: str) -> bool:
    """Whether a parameter's rows are tokens (embedding and head)."""
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def shard_spec(name: str, config: BackboneConfig) -> ShardSpec | None:
    """The cut of a parameter, by its name; None where every rank holds it whole.

    linear_qkv is laid out by key/value head (its query heads, its key, its value), so
    that contiguous cuts keep heads together. A gated linear_fc1 is [gate; up], each cut
    by itself.
    """
    if is_vocabulary(name) or "linear_qkv." in name:
        return ShardSpec(0)
    if "linear_fc1." in name:
        return ShardSpec(0, parts=2 if config.activation == "swiglu" else 1)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return ShardSpec(1)
    return None


def mark_parallel(parameter: torch.nn.Parameter, spec: ShardSpec | None) -> None:
    """Set the attributes by which Megatron and DeepSpeed tell a shard from a copy.

    The norm of the gradient, above all, counts shards of every rank and copies of one
    rank.
    """
    parameter.tensor_model_parallel = spec is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if spec is None else spec.dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1 if spec is None else spec.parts  # type: ignore[attr-defined]
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def full_shape(shape: torch.Size, spec: ShardSpec | None, tp: int) -> list[int]:
    """The shape of the full tensor, from that of a shard."""
    sizes = list(shape)
    if spec is not None:
        sizes[spec.dim] *= tp
    return sizes


def init_tensor(name: str, shape: list[int], config: BackboneConfig, seed: int) -> Tensor:
    """The initial full tensor, fp32 on the CPU, from (seed, name) alone.

    Norms are 1, biases 0, weights normal with config.init_std. The two projections that
    write to the residual stream are smaller by sqrt(2 · layers).
    """
    if "norm" in name:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    std = config.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=seeded_generator(name, seed))


def seeded_generator(name: str, seed: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
