"""Where the ranks of a tensor-parallel group lie: on one node, whose links it needs."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.launch.config import LaunchConfig


def check_placement(launch: LaunchConfig, parallel: ParallelState) -> None:
    """Refuse a tensor-parallel group on several nodes, or warn where it is allowed.

    A collective over the group, where the workers are on several nodes.
    """
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    is_one_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == dist.get_world_size()
    if parallel.tp == 1 or is_one_node:
        return
    places: list[tuple[str, str, int]] = [("", "", 0)] * parallel.tp
    dist.all_gather_object(
        places, (node, socket.gethostname(), dist.get_rank()), group=parallel.tp_group
    )
    nodes = {number: name for number, name, _ in places}
    if len(nodes) == 1:
        return
    ranks = ", ".join(str(rank) for *_, rank in places)
    where = ", ".join(f"{name} (node {number})" for number, name in sorted(nodes.items()))
    problem = f"launch.tp {launch.tp}: the tensor-parallel group of ranks {ranks} lies on {where}"
    if not launch.tp_across_nodes:
        raise UserError(
            f"{problem}, whose links are slow for it; give each node a multiple of launch.tp, "
            "choose another launch.tp, or allow it with launch.tp_across_nodes=true"
        )
    if parallel.tp_rank == 0:
        print(f"warning: {problem}; its steps wait for the links between nodes", flush=True)
