"""Failures in torch, which is slow to load, of the workers of the launcher's tests."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tests.support.failing import count


def run_out_of_memory(folder: str) -> None:
    """As CUDA says it: with sizes, and who has the memory."""
    made = count(folder)
    raise torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {made}.50 GiB. GPU 0 has a total capacity of 79.10 "
        f"GiB of which {made}.21 GiB is free. Process {4000 + made} has 77 GiB memory in use."
    )


def name_no_interface(folder: str) -> None:
    """A gloo group on an interface that no node has."""
    count(folder)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth99"
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def share_a_gpu(folder: str) -> None:
    """As torch words what NCCL refuses."""
    made = count(folder)
    raise dist.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage, NCCL "
        "version 2.27.3\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        f"Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 0x{made}1000"
    )


def lose_a_peer_of_nccl(folder: str) -> None:
    count(folder)
    raise dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    )
