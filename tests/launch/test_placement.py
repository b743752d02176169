"""A tensor-parallel group over two nodes is
refused, or allowed with a warning.
"""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.placement import check_placement
from ilrec_dist.testing.distributed import Mesh, run_distributed

pytestmark = pytest.mark.slow


def place(mesh: Mesh, variable: str, nodes: list[int], is_allowed: bool) -> tuple[str, str]:
    """What a rank raises and prints, where rank r is on node nodes[r]."""
    parallel = ParallelState(
        mesh.tp,
        mesh.dp,
        mesh.tp_rank,
        mesh.dp_rank,
        mesh.tp_group,
        mesh.dp_group,
        torch.device("cpu"),
    )
    launch = LaunchConfig(workers=mesh.world_size, tp=mesh.tp, tp_across_nodes=is_allowed)
    printed, refusal = io.StringIO(), ""
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        for name in ("NODE_RANK", "GROUP_RANK"):
            patched.delenv(name, raising=False)
        patched.setenv(variable, str(nodes[mesh.rank]))
        patched.setenv("LOCAL_WORLD_SIZE", str(nodes.count(nodes[mesh.rank])))
        try:
            check_placement(launch, parallel)
        except UserError as error:
            refusal = str(error)
    return refusal, printed.getvalue()


# Ray Train sets the one, torchrun the other.
@pytest.mark.parametrize("variable", ["NODE_RANK", "GROUP_RANK"])
def test_groups_over_two_nodes_are_refused_or_warned_of(variable: str) -> None:
    assert run_distributed(place, 4, 2, variable, [0, 0, 1, 1], False) == [("", "")] * 4
    assert run_distributed(place, 4, 2, variable, [0, 0, 0, 0], False) == [("", "")] * 4

    refused = run_distributed(place, 4, 2, variable, [0, 1, 1, 0], False)
    for rank, (refusal, printed) in enumerate(refused):
        ranks = "0, 1" if rank < 2 else "2, 3"
        begin = f"launch.tp 2: the tensor-parallel group of ranks {ranks} lies on "
        assert refusal.startswith(begin) and not printed and "\n" not in refusal
        assert "(node 0), " in refusal and "(node 1), whose links are slow" in refusal
        assert refusal.endswith("or allow it with launch.tp_across_nodes=true")

    allowed = run_distributed(place, 4, 2, variable, [0, 1, 1, 0], True)
    assert not any(refusal for refusal, _ in allowed)
    # Once a group.
    lines = [printed.splitlines() for _, printed in allowed]
    assert [len(printed) for printed in lines] == [1, 0, 1, 0]
    assert lines[2][0].startswith("warning: launch.tp 2: the tensor-parallel group of ranks 2, 3 ")
