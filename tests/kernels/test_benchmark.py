"""What benchmarks/loss.py compares is the same loss: its materialised form against the operator's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import loss as benchmark
from tests.kernels.cases import distance


@pytest.mark.parametrize("peaked", [True, False])
def test_the_materialised_form_is_the_same_loss(peaked):
    n, v = 40, 900
    x = benchmark.make_inputs((n, 32, v, 2), "cpu", peaked)
    dense = torch.zeros(n, v)
    dense[torch.repeat_interleave(torch.arange(n), x.lists.indptr.diff()), x.lists.tokens] = x.rewards
    benchmark.materialised(x.hidden, x.head, x.targets, dense).backward()
    expected = [leaf.grad for leaf in x.leaves()]
    for leaf in x.leaves():
        leaf.grad = None
    benchmark.ours(x, benchmark.options(v, "torch", None))
    assert all(distance(leaf.grad, other) < 1e-5 for leaf, other in zip(x.leaves(), expected, strict=True))
