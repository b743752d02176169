"""`ilrec plan`: what a training takes on stated hardware, and whether it fits."""

from __future__ import annotations

import argparse
import sys

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import load_config
from ilrec_dist.plan.describe import describe, size
from ilrec_dist.plan.hardware import BYTES, LINK, OPERATIONS, Hardware, parse_quantity
from ilrec_dist.plan.plan import Plan, make_plan, nearest_fitting
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
    for flag in ("nodes", "gpus_per_node"):
        if getattr(hardware, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected at least 1")
    for flag in ("items", "users", "interactions"):
        if (count := getattr(arguments, flag)) is not None and count < 1:
            raise UserError(f"--{flag} {count}: expected at least 1")
    config = load_config(
        arguments.config, [*arguments.overrides, f"launch.workers={hardware.gpus}"]
    )
    given = DataSizes(arguments.items, arguments.users, arguments.interactions)
    plan = make_plan(config, hardware, given)
    sys.stdout.write(describe(plan))
    sys.stdout.flush()
    if not plan.fits:
        raise UserError(_refusal(plan))


def _refusal(plan: Plan) -> str:
    largest = max(plan.training, plan.validation, key=lambda parts: sum(parts.values()))
    part = max(largest, key=lambda name: largest[name])
    text = (
        f"it does not fit: a GPU needs {size(plan.needed)} of {size(plan.hardware.gpu_memory)}, "
        f"most of it {part} ({size(largest[part])}); "
    )
    nearest = nearest_fitting(plan)
    if nearest is None:
        return text + "nothing up to 8 times the nodes fits; take a smaller model or larger GPUs"
    change, other = nearest
    return text + f"the nearest that fits is {change} ({size(other.needed)})"
