"""A rank's part of the training state, and how
it is put together again for another layout.

DeepSpeed's ZeRO 1 and 2 lay the parameters of a tensor-parallel rank end to end, and
give every data-parallel rank one range of that: its master weights and moments in fp32.
ZeRO 3 gives it a range of every parameter instead. A part is the fragments of
parameters in those ranges, by name, so that it can be read under any tp, dp and stage.
The weights themselves are the rounded master weights, and frozen ones those of the
model that the training began with.
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
from ilrec_dist.training.weight_ranges import cuts_weights, own_range, shape_of

# The master weight and Adam's two moments, under the names of the files.
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a parameter's
    flattened shard, at `offset` of the rank's master weights.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    offset: int

    @property
    def span(self) -> slice:
        """Of the master weights."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(frozen=True)
class FlatGroup:
    """Master weights that lie end to end, one
    parameter of the optimizer inside, and of what they are.
    """

    master: Tensor
    fragments: list[Fragment]
    # The optimizer's group that has their learning rate.
    options: Mapping[str, Any]


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
    names = _names(module)
    for group in flat_groups(optimizer):
        state = optimizer.optimizer.state.get(group.master, {})
        kept = {WEIGHT: group.master} | {kind: state[kind] for kind in MOMENTS if kind in state}
        for fragment in group.fragments:
            name = names[id(fragment.parameter)]
            for kind, values in kept.items():
                part = values.detach()[fragment.span]
                tensors[f"{kind}/{name}"] = part.to("cpu", copy=True)
            described[name] = {
                "start": fragment.start,
                "stop": fragment.stop,
                "shape": list(shape_of(fragment.parameter)),
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
    saved, names = SavedState.open(files), _names(module)
    for group in flat_groups(optimizer):
        kept = {WEIGHT: group.master.detach()}
        if saved.step > 0:
            state = optimizer.optimizer.state[group.master]
            # A fused step reads its number on the device.
            device = group.master.device if group.options.get("fused") else torch.device("cpu")
            state["step"] = torch.tensor(saved.step, dtype=torch.float32, device=device)
            for moment in MOMENTS:
                state[moment] = kept[moment] = torch.zeros_like(group.master)
        for fragment in group.fragments:
            for kind, target in kept.items():
                name = names[id(fragment.parameter)]
                target[fragment.span].copy_(saved.read(kind, name, fragment, parallel))
    if cuts_weights(engine):
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    else:
        optimizer.update_lp_params()


def _names(module: nn.Module) -> dict[int, str]:
    """The names of the parameters by their `id`."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def flat_groups(optimizer: Any) -> list[FlatGroup]:
    """What this rank keeps, in the layout of whichever
    of DeepSpeed's optimizers it is.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_groups_of_cut_weights(optimizer))
    return list(_groups_end_to_end(optimizer))


def _groups_of_cut_weights(optimizer: Any) -> Iterator[FlatGroup]:
    """Under ZeRO 3: this rank's range of every parameter, with its padding."""
    for number, parameters in enumerate(optimizer.fp16_groups):
        fragments, offset = [], 0
        for parameter in parameters:
            start, stop = own_range(parameter)
            if start < stop:
                fragments.append(Fragment(parameter, start, stop, offset))
            offset += parameter.ds_tensor.ds_numel
        options = optimizer.param_groups[optimizer.sub_group_to_group_id[number]]
        yield FlatGroup(optimizer.fp32_partitioned_groups_flat[number], fragments, options)


def _groups_end_to_end(optimizer: Any) -> Iterator[FlatGroup]:
    """Under ZeRO 1 and 2: the range of all parameters that
    lie end to end. In bf16 under ZeRO 1 it is another optimizer.
    """
    is_bf16 = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if is_bf16 else optimizer.round_robin_bit16_groups
    masters = (
        optimizer.fp32_groups_flat_partition
        if is_bf16
        else optimizer.single_partition_of_fp32_groups
    )
    for number, parameters in enumerate(groups):
        if is_bf16:
            sizes = [parameter.numel() for parameter in parameters]
            offsets = [0, *itertools.accumulate(sizes)][:-1]
        else:
            offsets = optimizer.round_robin_bit16_offsets[number]
        master, rank = masters[number], dist.get_rank(optimizer.real_dp_process_group[number])
        low, high = rank * master.numel(), (rank + 1) * master.numel()
        fragments = []
        for parameter, offset in zip(parameters, offsets, strict=True):
            start = max(low, offset) - offset
            stop = min(high, offset + parameter.numel()) - offset
            if start < stop:
                fragments.append(Fragment(parameter, start, stop, offset + start - low))
        yield FlatGroup(master, fragments, optimizer.param_groups[number])


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

    def read(self, kind: str, name: str, fragment: Fragment, parallel: ParallelState) -> Tensor:
        """The values of a fragment of the named parameter, fp32 [stop - start]."""
        if name not in self.places:
            raise UserError(
                f"checkpoint: has no parameter {name!r}; it is of another configuration"
            )
        spec = spec_of(fragment.parameter)
        if self.tp == parallel.tp or spec is None:
            rank = parallel.tp_rank if self.tp == parallel.tp else 0
            return self._range(kind, name, rank, fragment.start, fragment.stop)
        shards = []
        for rank in range(self.tp):
            shape = self.shapes[name, rank]
            size = torch.Size(shape).numel()
            shards.append(self._range(kind, name, rank, 0, size).view(shape))
        mine = spec.slice(spec.join(shards), parallel.tp_rank, parallel.tp)
        if mine.shape != shape_of(fragment.parameter):
            raise UserError(
                f"checkpoint: the parameter {name!r} of tp {self.tp} cannot be cut for tp "
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
