"""A rank's part of the training state, and how
it is put together again for another layout.

DeepSpeed's ZeRO 1 and 2 lay the parameters of a tensor-parallel rank end to end, and
give every data-parallel rank one range of that: its master weights and moments in fp32.
A part is the fragments of parameters in that range, by name, so that it can be read
under any tp and dp. The weights themselves are the rounded master weights, and frozen
ones those of the model that the training began with.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.model.sharding import ShardSpec

# The master weight and Adam's two moments, under the names of the files.
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a parameter's
    flattened shard, at `offset` of the rank's range.
    """

    name: str
    group: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that DeepSpeed lays end to end, and this rank's range of them."""

    parameters: list[nn.Parameter]
    # Where each parameter begins.
    offsets: list[int]
    low: int
    high: int
    # The range's master weights, one parameter of the optimizer inside.
    master: Tensor


@dataclass(frozen=True)
class Part:
    """What one rank writes: copies in host
    memory, and what they are, as JSON values.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]


def take_part(engine: Any, module: nn.Module, parallel: ParallelState) -> Part:
    """This rank's part of the state. The training may go on at once: it is a copy."""
    optimizer = engine.optimizer
    tensors: dict[str, Tensor] = {}
    described = {}
    shapes = {name: list(p.shape) for name, p in module.named_parameters()}
    groups = flat_groups(optimizer)
    for fragment in _fragments(optimizer, module):
        master = groups[fragment.group].master
        state = optimizer.optimizer.state.get(master, {})
        span = slice(fragment.offset, fragment.offset + fragment.stop - fragment.start)
        kept = {WEIGHT: master, **{moment: state[moment] for moment in MOMENTS if moment in state}}
        for kind, values in kept.items():
            tensors[f"{kind}/{fragment.name}"] = values.detach()[span].to("cpu", copy=True)
        described[fragment.name] = {
            "start": fragment.start,
            "stop": fragment.stop,
            "shape": shapes[fragment.name],
        }
    steps = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    return Part(
        tensors,
        {
            "tp": parallel.tp,
            "tp_rank": parallel.tp_rank,
            "fragments": described,
            "step": max(steps, default=0.0),
        },
    )


@torch.no_grad()
def restore(engine: Any, module: nn.Module, parallel: ParallelState, files: Sequence[Path]) -> None:
    """Fill weights and optimizer from the parts of all ranks, of whatever tp and dp.

    A collective. At no time is more than one parameter whole
    in memory. Raises UserError that names a parameter which
    the parts do not have or cannot be cut for this tp.
    """
    optimizer = engine.optimizer
    saved = SavedState.open(files)
    parameters = dict(module.named_parameters())
    states = []
    for group, options in zip(flat_groups(optimizer), optimizer.param_groups, strict=True):
        kept = {WEIGHT: group.master.detach()}
        if saved.step > 0:
            state = optimizer.optimizer.state[group.master]
            # A fused step reads its number on the device.
            device = group.master.device if options.get("fused") else torch.device("cpu")
            state["step"] = torch.tensor(saved.step, dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = kept[moment] = torch.zeros_like(group.master)
        states.append(kept)
    for fragment in _fragments(optimizer, module):
        span = slice(fragment.offset, fragment.offset + fragment.stop - fragment.start)
        for kind, target in states[fragment.group].items():
            values = saved.read(kind, fragment, parameters[fragment.name], parallel)
            target[span].copy_(values)
    optimizer.update_lp_params()


def _fragments(optimizer: Any, module: nn.Module) -> Iterator[Fragment]:
    """The fragments of this rank's ranges."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for number, group in enumerate(flat_groups(optimizer)):
        for parameter, offset in zip(group.parameters, group.offsets, strict=True):
            start = max(group.low, offset) - offset
            stop = min(group.high, offset + parameter.numel()) - offset
            if start < stop:
                at = offset + start - group.low
                yield Fragment(names[id(parameter)], number, start, stop, at)


def flat_groups(optimizer: Any) -> list[FlatGroup]:
    """The layout of either of DeepSpeed's optimizers:
    in bf16 under ZeRO 1 it is another one.
    """
    is_bf16 = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if is_bf16 else optimizer.round_robin_bit16_groups
    masters = (
        optimizer.fp32_groups_flat_partition
        if is_bf16
        else optimizer.single_partition_of_fp32_groups
    )
    flat = []
    for number, parameters in enumerate(groups):
        if is_bf16:
            sizes = [parameter.numel() for parameter in parameters]
            offsets = [0, *itertools.accumulate(sizes)][:-1]
        else:
            offsets = optimizer.round_robin_bit16_offsets[number]
        master, rank = masters[number], dist.get_rank(optimizer.real_dp_process_group[number])
        size = master.numel()
        flat.append(FlatGroup(parameters, offsets, rank * size, (rank + 1) * size, master))
    return flat


class SavedState:
    """The parts of all ranks of a checkpoint, mapped and read by parameter."""

    def __init__(self, readers: Sequence[Any], descriptions: Sequence[Mapping[str, Any]]) -> None:
        self.step: float = max(part["step"] for part in descriptions)
        self.tp: int = descriptions[0]["tp"]
        # Parameter → tensor-parallel rank → (start, stop, reader) of its fragments.
        self.places: dict[str, dict[int, list[tuple[int, int, Any]]]]
        self.places = defaultdict(lambda: defaultdict(list))
        self.shapes: dict[tuple[str, int], list[int]] = {}
        for reader, part in zip(readers, descriptions, strict=True):
            rank = part["tp_rank"]
            for name, fragment in part["fragments"].items():
                self.shapes[name, rank] = fragment["shape"]
                self.places[name][rank].append((fragment["start"], fragment["stop"], reader))

    @classmethod
    def open(cls, files: Sequence[Path]) -> SavedState:
        readers: list[Any] = [safe_open(path, framework="pt") for path in files]
        return cls(readers, [json.loads(reader.metadata()["part"]) for reader in readers])

    def read(
        self, kind: str, fragment: Fragment, parameter: nn.Parameter, parallel: ParallelState
    ) -> Tensor:
        """The fragment's values, fp32 [stop - start]."""
        if fragment.name not in self.places:
            raise UserError(
                f"checkpoint: has no parameter {fragment.name!r}; it is of another configuration"
            )
        spec = spec_of(parameter)
        if self.tp == parallel.tp or spec is None:
            rank = parallel.tp_rank if self.tp == parallel.tp else 0
            return self._range(kind, fragment.name, rank, fragment.start, fragment.stop)
        shards = []
        for rank in range(self.tp):
            shape = self.shapes[fragment.name, rank]
            size = torch.Size(shape).numel()
            shards.append(self._range(kind, fragment.name, rank, 0, size).view(shape))
        mine = spec.slice(spec.join(shards), parallel.tp_rank, parallel.tp)
        if mine.shape != parameter.shape:
            raise UserError(
                f"checkpoint: the parameter {fragment.name!r} of tp {self.tp} cannot be cut for tp "
                f"{parallel.tp}; go on with launch.tp={self.tp}"
            )
        return mine.flatten()[fragment.start : fragment.stop]

    def _range(self, kind: str, name: str, rank: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a shard of the saved layout."""
        values = torch.empty(stop - start)
        for low, high, reader in self.places[name][rank]:
            first, last = max(low, start), min(high, stop)
            if first < last:
                piece = reader.get_slice(f"{kind}/{name}")[first - low : last - low]
                values[first - start : last - start] = piece
        return values


def spec_of(parameter: Any) -> ShardSpec | None:
    """How a parameter is cut over tp, as `sharding.mark_parallel` has noted it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return ShardSpec(parameter.partition_dim, parameter.partition_stride)
