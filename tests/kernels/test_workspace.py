"""No tensor of rows × vocabulary: what is alive during a call (METHOD.md §8.4).

It is counted tensor by tensor, and by resident memory.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from ilrec_kernels import cross_layer_loss
from ilrec_kernels.layout import gemm

from tests.support.live_bytes import LiveBytes, live_bytes
from tests.support.loss_cases import make_case

pytestmark = pytest.mark.slow


SCATTERED = torch.arange(3000)[torch.arange(3000) % 29 != 7]
SETTINGS: list[dict[str, Any]] = [
    dict(),
    dict(negative_scope="all", distill_scope="all"),
    dict(negative_scope="item_tokens", softmax_scope="valid_next"),
    dict(softmax_scope="valid_next", distill_scope="valid_next"),
    dict(beta=0.0, mu=0.0, crr_lambda=0.0),
    dict(negative_scope="all", distill_scope="all", dtype=torch.bfloat16),
    dict(d=256),
    dict(d=96, item_tokens=SCATTERED),
    dict(d=96, item_tokens=SCATTERED, dtype=torch.bfloat16),
    # Distillation is over some of the columns that the layers' logits are made of.
    dict(negative_scope="all", item_tokens=SCATTERED),
    dict(negative_scope="item_tokens", item_tokens=SCATTERED, softmax_scope="valid_next"),
    dict(d=96, distill_scope="all", trainable_rows=SCATTERED),
    dict(d=96, item_tokens=SCATTERED, trainable_rows=(100, 2000)),
    # The lists are wider than what a bucket may take.
    dict(d=256, longest=200, softmax_scope="valid_next", distill_scope="valid_next"),
    dict(longest=1500),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_nothing_exceeds_the_workspace(settings):
    n, v = 128, 3000
    # Logits of all rows are larger than that, in bf16 too.
    workspace = n * v * 8 // 5
    trainable = settings.get("trainable_rows")
    settings = {"d": 24, "item_tokens": (0, v)} | {
        name: value for name, value in settings.items() if name != "trainable_rows"
    }
    mode = live_bytes(
        make_case(n=n, v=v, workspace_bytes=workspace, **settings), trainable_rows=trainable
    )
    assert mode.largest <= workspace
    assert mode.peak <= 1.1 * workspace + 40 * n * 8, mode.peak / workspace
    assert mode.peak >= workspace / 20


@pytest.mark.parametrize("softmax", ["all", "valid_next"])
def test_no_gradient_of_the_heads_size_is_made_for_a_few_trained_rows(softmax):
    n, v, d, rows = 16, 2000, 64, (1900, 2000)
    case = make_case(
        n=n, v=v, d=d, workspace_bytes=400_000, item_tokens=rows, softmax_scope=softmax
    )
    hidden = [h.clone().requires_grad_() for h in case.hidden]
    largest = []
    for apart in (case.head[slice(*rows)].clone().requires_grad_(), None):
        head = case.head.clone().requires_grad_(apart is None)
        inputs = hidden[0], hidden[1:], head, case.targets, case.lists, case.rewards
        mode = LiveBytes([])
        mode.seen.add(head.untyped_storage()._cdata)
        with mode:
            output = cross_layer_loss(
                *inputs, case.options, trainable_rows=rows, trained_rows=apart
            )
            output.loss.backward()
        largest.append(mode.largest)
    assert largest[0] <= 400_000 < v * d * 4 <= largest[1]


@pytest.mark.parametrize("trainable", [None, SCATTERED])
def test_bf16_products_on_a_cpu_keep_to_the_workspace(trainable, monkeypatch):
    """They make blocks of the head's gradient, which may not be as large as
    the head.
    """
    monkeypatch.setattr(gemm, "cpu_multiplies_bf16", lambda: True)
    n, v, workspace = 256, 3000, 600_000
    scopes = dict(negative_scope="all", distill_scope="all", item_tokens=(0, v))
    case = make_case(n=n, d=96, v=v, dtype=torch.bfloat16, workspace_bytes=workspace, **scopes)
    mode = live_bytes(case, trainable_rows=trainable)
    assert mode.largest <= workspace
    assert mode.peak <= 1.1 * workspace + 40 * n * 8, mode.peak / workspace


RESIDENT = """
import resource, torch
from tests.support.loss_cases import make_case, run_case
torch.set_num_threads(1)
run_case(make_case(n=64, v=2000, d=64, negative_scope="all", distill_scope="all"))
scopes = dict(negative_scope="all", distill_scope="all")
case = make_case(n=1024, v=40_000, d=64, workspace_bytes=16 << 20, **scopes)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_case(case)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_resident_memory():
    """Three streams' logits would be 469 MiB.

    The gradients of the head and the rows, and the head's copy, are about 30.
    """
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 110, done.stdout
