"""The process layout: tensor- and data-parallel groups.

CPU runs use gloo, CUDA runs NCCL, and nothing else differs.
"""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState

# Of a collective, where the caller names none.
TIMEOUT_SECONDS = 600.0


def initialize_parallel(
    tp: int,
    device: Literal["cpu", "cuda"] = "cpu",
    seed: int = 0,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> ParallelState:
    """Set up torch.distributed (unless it is), Megatron's groups and the generators.

    torch.distributed is read from env:// (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT);
    without RANK it is a world of one process. The global generators are seeded by
    data-parallel rank, so that the ranks of a tensor-parallel group draw the same
    dropout on activations that they all hold. A collective that takes longer than
    `timeout_seconds` fails. Raises UserError when tp does not divide the world size or
    there is no CUDA device.
    """
    if device == "cpu":
        # Without this DeepSpeed takes a GPU that it finds.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _keep_freed_memory()
    else:
        if not torch.cuda.is_available():
            raise UserError(
                "launch.device is cuda but torch sees no CUDA device; use launch.device=cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if tp > 1:
        # Lets Megatron overlap the all-reduce of a gradient with the next GEMM.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ:
            timeout = timedelta(seconds=timeout_seconds)
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            # DeepSpeed reads it.
            os.environ.setdefault("LOCAL_RANK", "0")
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    world_size = dist.get_world_size()
    if world_size % tp:
        raise UserError(
            f"launch.tp {tp} does not divide the world size {world_size}; start a multiple of "
            f"{tp} workers or choose a tp that divides it"
        )
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() != tp:
            raise UserError(
                "this process is already laid out with "
                f"tp={parallel_state.get_tensor_model_parallel_world_size()}, not tp={tp}"
            )
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_seconds / 60,
        )
        if device == "cpu":
            # gloo connects a group's ranks when it is made. One that has nothing to do must not
            # end while others still connect to it. NCCL connects at the first collective.
            dist.barrier()
    # Megatron's own tracker keeps CUDA generators. This one makes its forks no-ops, so that the
    # global generator is the only one.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    state = ParallelState(
        tp=tp,
        dp=world_size // tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        device=torch.device("cuda", torch.cuda.current_device())
        if device == "cuda"
        else torch.device("cpu"),
    )
    torch.manual_seed(seed * 1_000_003 + state.dp_rank)
    return state


def destroy_parallel(process_group: bool = False) -> None:
    """Drop Megatron's groups and, with `process_group`, torch.distributed itself.

    A launcher that set up torch.distributed ends it itself.
    """
    parallel_state.destroy_model_parallel()
    if process_group and dist.is_initialized():
        dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Have glibc keep the large blocks of each step rather than return them.

    A CPU step is 15 % faster without the page faults. Blocks that hold gradients of
    a whole model are returned: others could not be put together from their places.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_THRESHOLD: smaller blocks come from the heap.
        mallopt(-3, 1 << 28)
        # M_TRIM_THRESHOLD: freed blocks stay there.
        mallopt(-1, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Have glibc return what was freed so far, such as what loading has used."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
