"""A rank's part of the training state, and how
it is put together again for another layout.

DeepSpeed's ZeRO 1 and 2 lay the parameters of a tensor-parallel rank end to end, and
give every data-parallel rank one range of that: its master weights and moments in fp32.
ZeRO 3 gives it a range of every parameter instead. A part is the fragments of
parameters in those ranges: chunks of one-dimensional tensors, of which
`exp_avg/NAME/tp-0-of-2` is the flattened shard of the first of two tensor-parallel
ranks. So they can be read under any tp, dp and stage. The weights themselves are the
rounded master weights, and frozen ones those of the model that the training began with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.model.sharding import ShardSpec
from ilrec_dist.training.checkpoint import Checkpoint, Layout, Part
from ilrec_dist.training.saved_tensors import Range, SavedTensors
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


def take_part(engine: Any, module: nn.Module, parallel: ParallelState) -> Part:
    """This rank's part of the state. The training may go on at once: it is a copy."""
    optimizer = engine.optimizer
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    names = _names(module)
    for group in flat_groups(optimizer):
        state = optimizer.optimizer.state.get(group.master, {})
        kept = {WEIGHT: group.master} | {kind: state[kind] for kind in MOMENTS if kind in state}
        for fragment in group.fragments:
            shard = _shard(names[id(fragment.parameter)], parallel.tp_rank, parallel.tp)
            shapes[shard] = list(shape_of(fragment.parameter))
            for kind, values in kept.items():
                part = values.detach()[fragment.span]
                tensors[f"{kind}/{shard}"] = part.to("cpu", copy=True)
                starts[f"{kind}/{shard}"] = fragment.start
    steps = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    return Part(tensors, starts, Layout(parallel.tp, max(steps, default=0.0), shapes))


@torch.no_grad()
def restore(engine: Any, module: nn.Module, parallel: ParallelState, saved: Checkpoint) -> None:
    """Fill weights and optimizer from a checkpoint of whatever tp and dp.

    A collective. At no time is more than one parameter whole
    in memory. Raises UserError that names a parameter which
    the checkpoint does not have or cannot be cut for this tp.
    """
    optimizer = engine.optimizer
    state, names = SavedState(saved), _names(module)
    direct: list[Range] = []
    for group in flat_groups(optimizer):
        kept = {WEIGHT: group.master.detach()}
        if saved.layout.step > 0:
            kept |= _new_moments(optimizer.optimizer, group, saved.layout.step)
        for fragment in group.fragments:
            name = names[id(fragment.parameter)]
            shard = state.shard(name, fragment.parameter, parallel)
            for kind, target in kept.items():
                values = target[fragment.span]
                if shard is not None:
                    direct.append(Range(f"{kind}/{shard}", fragment.start, values))
                else:
                    values.copy_(state.cut_anew(kind, name, fragment, parallel))
    # All at once, so that every file is opened once.
    state.tensors.read(direct)
    if cuts_weights(engine):
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    else:
        optimizer.update_lp_params()


def _new_moments(optimizer: Any, group: FlatGroup, step: float) -> dict[str, Tensor]:
    """Give the group's state the number of the step and moments, which are returned."""
    state = optimizer.state[group.master]
    # A fused step reads its number on the device.
    device = group.master.device if group.options.get("fused") else torch.device("cpu")
    state["step"] = torch.tensor(step, dtype=torch.float32, device=device)
    moments = {moment: torch.zeros_like(group.master) for moment in MOMENTS}
    state |= moments
    return moments


def _shard(name: str, tp_rank: int, tp: int) -> str:
    """A parameter's shard, by its name in the files."""
    return f"{name}/tp-{tp_rank}-of-{tp}"


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
    """A checkpoint's tensors, read by parameter."""

    def __init__(self, saved: Checkpoint) -> None:
        self.layout, self.tensors = saved.layout, SavedTensors(saved.path)

    def shard(self, name: str, parameter: nn.Parameter, parallel: ParallelState) -> str | None:
        """The saved shard that is this rank's own; None where it must be cut anew.

        Raises UserError where the checkpoint has no such parameter.
        """
        if _shard(name, 0, self.layout.tp) not in self.layout.shapes:
            raise UserError(
                f"checkpoint: has no parameter {name!r}; it is of another configuration"
            )
        if self.layout.tp == parallel.tp:
            return _shard(name, parallel.tp_rank, parallel.tp)
        return _shard(name, 0, self.layout.tp) if spec_of(parameter) is None else None

    def cut_anew(self, kind: str, name: str, fragment: Fragment, parallel: ParallelState) -> Tensor:
        """A fragment of a parameter that is saved for another tp, fp32 [stop - start].

        Raises UserError where it cannot be cut for this one.
        """
        spec, tp = spec_of(fragment.parameter), self.layout.tp
        assert spec is not None
        shards = {
            name: torch.empty(self.layout.shapes[name])
            for name in (_shard(name, rank, tp) for rank in range(tp))
        }
        self.tensors.read(
            [Range(f"{kind}/{shard}", 0, values.view(-1)) for shard, values in shards.items()]
        )
        mine = spec.slice(spec.join(list(shards.values())), parallel.tp_rank, parallel.tp)
        if mine.shape != shape_of(fragment.parameter):
            raise UserError(
                f"checkpoint: the parameter {name!r} of tp {tp} cannot be cut for tp "
                f"{parallel.tp}; go on with launch.tp={tp}"
            )
        return mine.flatten()[fragment.start : fragment.stop]


def spec_of(parameter: nn.Parameter) -> ShardSpec | None:
    """How a parameter is cut over tp, as `sharding.mark_parallel` has noted it."""
    spec: ShardSpec | None = getattr(parameter, "shard_spec", None)
    return spec
