"""Counts what a real training takes: bytes in collectives, bytes of tensors."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ilrec_dist.model import layers

# The functions through which the project, Megatron and DeepSpeed communicate, and which argument
# is the whole tensor: what is reduced or sent, or what every rank holds after a gathering.
_WHOLE_TENSOR = {
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce": (0, "tensor"),
    "reduce_scatter_tensor": (1, "input"),
}

# The functions that DeepSpeed has kept from the time when it was imported, and their names.
_KEPT = {
    "all_gather_function": "all_gather_into_tensor",
    "reduce_scatter_function": "reduce_scatter_tensor",
}

RELEASE_SECONDS = 0.01


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
                operation = name.removesuffix("_into_tensor").removesuffix("_tensor")
                counter[operation] += _whole_bytes(name, args, kwargs)
            return original(*args, **kwargs)

        return call

    backend = deepspeed.comm.comm.cdb
    kept = {key: getattr(backend, key) for key in _KEPT}
    try:
        for name, original in originals.items():
            setattr(dist, name, counting(name, original))
        for key, original in kept.items():
            setattr(backend, key, counting(_KEPT[key], original))
        yield counter
    finally:
        for key, original in kept.items():
            setattr(backend, key, original)
        for name, original in originals.items():
            setattr(dist, name, original)


def _whole_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if name == "all_gather":
        shards: list[Tensor] = args[0] if args else kwargs["tensor_list"]
        return sum(shard.numel() * shard.element_size() for shard in shards)
    position, key = _WHOLE_TENSOR[name]
    whole: Tensor = args[position] if len(args) > position else kwargs[key]
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
def saved_for_backward(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for backward in the block, parameters left out.

    The list is filled while the block runs, and keeps what it holds alive.
    """
    saved: list[Tensor] = []
    of_parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        # A weight that is gathered for each use has another storage every time.
        is_weight = isinstance(tensor, nn.Parameter)
        is_weight = is_weight or tensor.untyped_storage().data_ptr() in of_parameters
        if tensor.is_floating_point() and not is_weight:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


@contextmanager
def kept_by_recomputation() -> Iterator[list[int]]:
    """Bytes that each recomputation of a layer leaves for the layer's backward pass.

    Of the layers that run in the block. The recomputations
    fill the list, and go on behind the last tensor that is
    kept, where a training's own end.
    """
    alive: list[int] = []

    @contextmanager
    def recomputing() -> Iterator[None]:
        with _NewStorages() as made:
            yield
        # A thread of the last collective may hold its tensor for a moment.
        time.sleep(RELEASE_SECONDS)
        alive.append(made.alive())

    contexts = partial(checkpoint, context_fn=lambda: (nullcontext(), recomputing()))
    vars(layers)["checkpoint"] = contexts
    try:
        with set_checkpoint_early_stop(False):
            yield alive
    finally:
        vars(layers)["checkpoint"] = checkpoint


class _NewStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages that operations make, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.older: set[int] = set()
        self.made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages(args):
            if storage._cdata not in self.made:
                self.older.add(storage._cdata)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self.older:
                self.made[storage._cdata] = weakref.ref(storage)
        return out

    def alive(self) -> int:
        storages = (reference() for reference in self.made.values())
        return sum(storage.nbytes() for storage in storages if storage is not None)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if torch.is_tensor(value) and value.is_floating_point():
            yield value.untyped_storage()
