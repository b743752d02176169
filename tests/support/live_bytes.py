"""What is alive during a call, tensor by tensor."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.loss_cases import Case, run_case


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside: the `largest`, and the `peak` of all.

    Storages of a size in `free` are not counted.
    """

    def __init__(self, free: list[int]) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.free, self.seen = free, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # To look for leaves takes longer than most operations.
        for tensor in [out] if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or size in self.free:
            return
        self.seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def live_bytes(case: Case, backend: str = "torch", **kwargs: Any) -> LiveBytes:
    """What a call makes besides its inputs and gradients."""
    (n, d), v = case.hidden[0].shape, case.head.shape[0]
    # The sizes are those of the gradients of the hidden rows and of the head.
    mode = LiveBytes([n * d * 4, n * d * 2, v * d * 4, v * d * 2])
    for tensor in (
        *case.hidden,
        case.head,
        case.targets,
        case.lists.indptr,
        case.lists.tokens,
        case.rewards,
    ):
        mode.seen.add(tensor.untyped_storage()._cdata)
    with mode:
        run_case(case, backend, **kwargs)
    return mode
