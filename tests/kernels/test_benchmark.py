"""What benchmarks/loss.py compares is the same loss, materialised and by
the operator.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks import loss as benchmark
from tests.support.loss_cases import distance


@pytest.mark.parametrize("peaked", [True, False])
def test_the_materialised_form_is_the_same_loss(peaked):
    n, v = 40, 900
    x = benchmark.make_inputs((n, 32, v, 2), "cpu", peaked)
    dense = torch.zeros(n, v)
    dense[torch.repeat_interleave(torch.arange(n), x.lists.indptr.diff()), x.lists.tokens] = (
        x.rewards
    )
    benchmark.materialised(x.hidden, x.head, x.targets, dense).backward()
    expected = [leaf.grad for leaf in x.leaves()]
    for leaf in x.leaves():
        leaf.grad = None
    benchmark.ours(x, benchmark.options(v, "torch", None))
    assert all(
        distance(leaf.grad, other) < 1e-5 for leaf, other in zip(x.leaves(), expected, strict=True)
    )


def test_the_gpu_benchmark_s_parts_run_and_see_a_wrong_gradient(monkeypatch):
    """On the CPU and small: all comparisons and figures that need no
    further package.
    """
    shape = (60, 16, 400, 2)
    found = list(gpu.distances("cpu", "torch", shape))
    assert len(found) == 8 and all(distance_ <= bound for _, distance_, bound in found)
    sizes = gpu.Sizes(
        "60x16x400x2",
        "20x16x400x2",
        "30x16x900x2",
        "30x16x400x1",
        (1 << 20, 1 << 30),
        1 << 16,
        repeats=3,
    )
    listed = benchmark.options(900, "triton", 1 << 20, **gpu.LISTED)
    # Few rows put the case in regime T.
    with pytest.raises(RuntimeError, match="regime V"):
        gpu.check_sliced(benchmark.make_inputs((30, 16, 900, 1), "cpu", True), listed)
    # Compiling would take longer than the whole test.
    monkeypatch.setattr(torch, "compile", lambda fn: fn)
    figures = list(gpu.figures("cpu", "torch", sizes))
    assert len(figures) == 7 and all(figure.measured == figure.measured for figure in figures)
    assert [figure.reached is None for figure in figures].count(True) == 1
    whole = gpu.cross_layer_loss
    monkeypatch.setattr(
        gpu,
        "cross_layer_loss",
        lambda *a, **k: whole(
            *a, **{**k, "loss_scale": k["loss_scale"] * (1.001 if a[6].backend == "torch" else 1)}
        ),
    )
    assert not any(
        distance_ <= bound for _, distance_, bound in list(gpu.distances("cpu", "torch", shape))[:3]
    )
