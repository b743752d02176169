"""log p of candidates whatever the blocks of columns
and the shards that their logits are made in.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.inference import parallel_head
from ilrec_dist.inference.parallel_head import ParallelHead, SoftmaxScope
from ilrec_dist.testing.distributed import Mesh, run_distributed

# The last two rows of the head are padding.
ROWS, WIDTH, VOCABULARY, PADDED = 7, 16, 150, 152
# The candidates of codes lie close together, those of titles anywhere.
RANGES = {"codes": (141, 150), "titles": (0, 150)}


def problem(of: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows, head, candidates and which of them exist."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    low, high = RANGES[of]
    token = torch.stack(
        [low + torch.randperm(high - low, generator=generator)[:6] for _ in range(ROWS)]
    )
    exists = torch.rand(ROWS, 6, generator=generator) < 0.7
    exists[:, 0] = True
    return hidden, weight, token, exists


def log_p(mesh: Mesh, of: str, scope: SoftmaxScope, elements: int) -> Tensor:
    parallel = initialize_parallel(mesh.tp, "cpu")
    try:
        hidden, weight, token, exists = problem(of)
        size = PADDED // mesh.tp
        start = parallel.tp_rank * size
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel_head, "BLOCK_ELEMENTS", elements)
            patch.setattr(parallel_head, "ROW_ELEMENTS", elements)
            head = ParallelHead(
                weight[start : start + size],
                (start, start + size),
                VOCABULARY,
                scope,
                parallel.tp_group,
            )
            # The second call finds what the first one converted.
            first, second = (
                head.log_probabilities(hidden, token, exists, RANGES[of]) for _ in range(2)
            )
        assert torch.equal(first, second)
        return first
    finally:
        destroy_parallel()


@pytest.mark.parametrize("scope", ["all", "valid_next"])
@pytest.mark.parametrize("of", list(RANGES))
@pytest.mark.parametrize(
    ("tp", "elements"), [(1, 1), (1, 100), (1, 1 << 20), (2, 100), (4, 1), (4, 1 << 20)]
)
def test_log_p_is_the_definition_s(tp: int, elements: int, of: str, scope: SoftmaxScope) -> None:
    hidden, weight, token, exists = problem(of)
    logits = hidden.double() @ weight[:VOCABULARY].double().T
    chosen = logits.gather(1, token)
    over = logits if scope == "all" else chosen.masked_fill(~exists, -torch.inf)
    expected = chosen - over.logsumexp(1, keepdim=True)
    for found in run_distributed(log_p, tp, tp, of, scope, elements):
        torch.testing.assert_close(found[exists].double(), expected[exists], atol=1e-5, rtol=0)
