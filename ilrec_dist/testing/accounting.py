"""Counts what a real training takes: bytes in collectives, bytes of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

# The functions through which the project, Megatron and DeepSpeed communicate, and which argument
# is the whole tensor: what is reduced or sent, or what every rank holds after a gathering.
_WHOLE_TENSOR = {"all_reduce": 0, "broadcast": 0, "all_gather_into_tensor": 0, "reduce": 0}


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Bytes of the collectives that this process calls in the block, by operation.

    After DeepSpeed's engine is built. Groups of one process are
    left out. A tensor counts once, whatever the algorithm sends
    for it; a gathering counts all that a rank holds afterwards.
    """
    counter: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in (*_WHOLE_TENSOR, "all_gather")}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if dist.get_world_size(group) > 1:
                operation = "all_gather" if name.startswith("all_gather") else name
                counter[operation] += _whole_bytes(name, args, kwargs)
            return original(*args, **kwargs)

        return call

    # DeepSpeed has kept a function of its own from the time when it was imported.
    backend = deepspeed.comm.comm.cdb
    gather = backend.all_gather_function
    try:
        for name, original in originals.items():
            setattr(dist, name, counting(name, original))
        backend.all_gather_function = counting("all_gather_into_tensor", gather)
        yield counter
    finally:
        backend.all_gather_function = gather
        for name, original in originals.items():
            setattr(dist, name, original)


def _whole_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if name == "all_gather":
        shards: list[Tensor] = args[0] if args else kwargs["tensor_list"]
        return sum(shard.numel() * shard.element_size() for shard in shards)
    keys = ("tensor", "output_tensor")
    whole: Tensor = args[0] if args else next(kwargs[key] for key in keys if key in kwargs)
    return whole.numel() * whole.element_size()


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """The memory of the tensors, each storage counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for backward in the block, parameters left out.

    The list is filled while the block runs, and keeps what it holds alive.
    """
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad) and tensor.is_floating_point():
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
