"""`ilrec plan`: what a training takes on stated hardware, and whether it fits."""

from __future__ import annotations

import argparse
import sys

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import load_config
from ilrec_dist.pipeline.artifacts import with_hub_model
from ilrec_dist.plan.describe import describe, size
from ilrec_dist.plan.hardware import BYTES, LINK, OPERATIONS, Hardware, parse_quantity
from ilrec_dist.plan.nearest import nearest_fitting
from ilrec_dist.plan.plan import Plan, make_plan
from ilrec_dist.plan.workload import DataSizes


def run(arguments: argparse.Namespace) -> None:
    """Print the plan; raise UserError that names
    the nearest one that fits, if it does not.
    """
    hardware = Hardware(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        gpu_memory=parse_quantity(arguments.gpu_memory, "--gpu-memory", BYTES, "80GiB"),
        interconnect=parse_quantity(arguments.interconnect, "--interconnect", LINK, "400Gb/s"),
        node_link=parse_quantity(arguments.node_link, "--node-link", LINK, "450GB/s"),
        gemm=parse_quantity(arguments.gemm, "--gemm", OPERATIONS, "600TFLOP/s"),
        peak=parse_quantity(arguments.peak, "--peak", OPERATIONS, "989TFLOP/s"),
        memory_bandwidth=parse_quantity(
            arguments.memory_bandwidth, "--memory-bandwidth", LINK, "3.3TB/s"
        ),
        disk=parse_quantity(arguments.disk, "--disk", LINK, "2GB/s"),
    )
    host_memory = arguments.host_memory
    if host_memory is not None:
        host_memory = parse_quantity(host_memory, "--host-memory", BYTES, "512GiB")
    for flag in ("nodes", "gpus_per_node"):
        if getattr(hardware, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected at least 1")
    for flag in ("items", "users", "interactions"):
        if (count := getattr(arguments, flag)) is not None and count < 1:
            raise UserError(f"--{flag} {count}: expected at least 1")
    config = with_hub_model(
        load_config(arguments.config, [*arguments.overrides, f"launch.workers={hardware.gpus}"])
    )
    stated = DataSizes(arguments.items, arguments.users, arguments.interactions)
    plan = make_plan(config, hardware, stated)
    if host_memory is not None and plan.host is None:
        raise UserError(
            "--host-memory: the size of the data, from which the memory of a host follows, is not "
            "known yet; give --items, --users and --interactions, or run `ilrec prepare` first"
        )
    sys.stdout.write(describe(plan))
    sys.stdout.flush()
    if not plan.fits:
        raise UserError(_refusal(plan))
    if host_memory is not None and plan.host is not None:
        _check_host(plan.host, host_memory)


def _check_host(host: dict[str, float], limit: float) -> None:
    """Raise UserError where a node's host has less memory than its parts take."""
    needed = sum(host.values())
    if needed <= limit:
        return
    part = max(host, key=lambda name: host[name])
    raise UserError(
        f"it does not fit: a node's host needs {size(needed)} of {size(limit)} (--host-memory), "
        f"most of it {part} ({size(host[part])}); take nodes with more memory, or more nodes, "
        "which share out checkpoints and reward actors"
    )


def _refusal(plan: Plan) -> str:
    largest = max(plan.training, plan.validation, key=lambda parts: sum(parts.values()))
    part = max(largest, key=lambda name: largest[name])
    text = (
        f"it does not fit: a GPU needs {size(plan.needed)} of {size(plan.hardware.gpu_memory)}, "
        f"most of it {part} ({size(largest[part])}); "
    )
    nearest = nearest_fitting(plan)
    if nearest is None:
        text += "nothing up to 8 times the nodes fits; take a smaller model or larger GPUs"
        return text + ", or set cf.rewards=actor" * part.startswith("rewards")
    seconds, asked = nearest.plan.time.total, plan.time.total
    return text + (
        f"append {nearest.words}, the nearest that fits: {size(nearest.plan.needed)}, and "
        f"{seconds:.3f} s a step in place of {asked:.3f}"
    )
