"""What does the cross-layer loss cost against its own matrix products, forward and
backward?

    python benchmarks/loss.py [--quick] [--json FILE] [--logits random]

The limit is the bare products of the same work: 3 of them a stream (logits, hidden
gradient, head gradient), the best of chunked and whole.
Liger's and Apple's kernels take part where they are installed (`pip install .[bench]`),
each with the part it can do.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    command_line,
    describe_machine,
    machine_line,
    peak_mib,
    reset_peak,
    status_mib,
    write_figures,
)
from ilrec_kernels import LossOptions, TokenLists, cross_layer_loss
from torch import Tensor

CPU_SHAPES = ["2048x256x32000x3", "2048x1024x32000x3"]
CUDA_SHAPES = ["8192x4096x131072x3", "512x4096x131072x3"]
QUICK_SHAPES = ["256x256x32000x3"]
BETA, MU, LAMBDA, FLOOR, K = 1.0, 0.1, 0.02, 1e-4, 64
PLAIN: dict[str, Any] = {"beta": 0.0, "crr_lambda": 0.0}


@dataclass(frozen=True)
class Inputs:
    """Leaves that need gradients, the target, and per row 256 candidate tokens with
    rewards.
    """

    hidden: list[Tensor]
    head: Tensor
    targets: Tensor
    lists: TokenLists
    rewards: Tensor

    def leaves(self) -> list[Tensor]:
        return [*self.hidden, self.head]


def make_inputs(shape: tuple[int, int, int, int], device: str, peaked: bool) -> Inputs:
    """Make inputs of one of two kinds.

    Peaked: layers that agree in part, logits of standard deviation about 3 and a target
    that is among the likely tokens, as in a trained model.
    Random: nothing agrees with anything, so that about half the vocabulary passes the
    negatives' threshold.
    """
    n, d, v, m = shape
    # A large head is drawn on the device: on the host it would take minutes.
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    head = normal(v, d)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    common = normal(n, d) + 6.0 * head[targets] / math.sqrt(d)
    scale = 2.0 / math.sqrt(d)
    noise = [normal(n, d) for _ in range(m + 1)]
    hidden = [(common + 0.5 * x) * scale if peaked else x * scale for x in noise]
    tokens = torch.stack([torch.randperm(v, generator=g, device=device)[:255] for _ in range(8)])[
        torch.arange(n, device=device) % 8
    ]
    tokens = torch.cat([tokens, targets[:, None]], 1).sort(1).values
    distinct = torch.ones_like(tokens, dtype=torch.bool)
    distinct[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    lists = TokenLists(F.pad(distinct.sum(1).cumsum(0), (1, 0)), tokens[distinct])
    rewards = torch.rand(lists.tokens.numel(), generator=g, device=device)

    def leaf(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_()

    return Inputs([leaf(h) for h in hidden], leaf(head), targets, lists, rewards)


def options(v: int, backend: str, workspace: int | None, **changes: Any) -> LossOptions:
    values = dict(
        negative_scope="all",
        distill_scope="all",
        beta=BETA,
        mu=MU,
        crr_lambda=LAMBDA,
        max_negatives=K,
        reward_floor=FLOOR,
    )
    return LossOptions(
        vocab_size=v, backend=backend, workspace_bytes=workspace, **{**values, **changes}
    )


def ours(x: Inputs, o: LossOptions) -> None:
    out = cross_layer_loss(
        x.hidden[0],
        x.hidden[1:],
        x.head,
        x.targets,
        x.lists,
        x.rewards,
        o,
        loss_scale=1 / len(x.targets),
    )
    torch.autograd.backward(out.loss)


def materialised(hidden: list[Tensor], head: Tensor, targets: Tensor, rewards: Tensor) -> Tensor:
    """The same loss over whole logits in eager torch; `rewards` is dense [N, V]."""
    n = targets.numel()
    z = [(h @ head.T).float() for h in hidden]
    with torch.no_grad():
        ensemble = torch.stack(z[1:]).mean(0)
        threshold = ensemble.gather(1, targets[:, None])
        ensemble.scatter_(1, targets[:, None], -torch.inf)
        value, index = ensemble.topk(K, 1)
        member = value >= threshold
        weight = value.masked_fill(~member, -torch.inf).softmax(1).nan_to_num()
        target_label = rewards.gather(1, targets[:, None])
        label = (rewards.gather(1, index) + FLOOR) * member
        covered = (rewards.gather(1, index) * member).amax(1, keepdim=True) > 0
        total = label.sum(1, keepdim=True) + target_label + FLOOR
        label = label / total * covered
        target_label = torch.where(covered, (target_label + FLOOR) / total, 1.0)
        has_negative = member.any(1)
    z_target = z[0].gather(1, targets[:, None])[:, 0]
    cpo = z[0].scatter_add(1, index, BETA * weight).logsumexp(1) - z_target
    log_p = z[0].log_softmax(1)
    teacher = log_p.detach()
    cpd = torch.stack(
        [
            F.kl_div(s.log_softmax(1), teacher, reduction="none", log_target=True).sum(1)
            for s in z[1:]
        ]
    ).mean(0)
    crr = (
        -(
            (label * log_p.gather(1, index)).sum(1)
            + target_label[:, 0] * log_p.gather(1, targets[:, None])[:, 0]
        )
        * has_negative
    )
    return (cpo + MU * cpd + LAMBDA * crr).sum() / n


def row_loop(x: Inputs, rows: int) -> None:
    """Run the form of the authors' script, one row at a time.

    It runs on a few rows; the caller scales the time.
    """
    total = x.head.new_zeros(())
    for i in range(rows):
        z = [h[i] @ x.head.T for h in x.hidden]
        p = torch.stack(z[1:]).mean(0).softmax(0).detach()
        negatives = (p >= p[x.targets[i]]).nonzero().flatten()[:K]
        adjusted = z[0].index_add(0, negatives, BETA * p[negatives].softmax(0).to(z[0].dtype))
        total = total + adjusted.logsumexp(0) - z[0][x.targets[i]]
        for s in z[1:]:
            total = total + MU / len(z[1:]) * F.kl_div(
                s.log_softmax(0), z[0].detach().log_softmax(0), reduction="sum", log_target=True
            )
    torch.autograd.backward(total)


def bare(x: Inputs, chunk: int) -> None:
    """The products alone, `chunk` stacked rows at a time, into buffers."""
    with torch.no_grad():
        rows, head = torch.cat(x.hidden), x.head.detach()
        dw = torch.zeros_like(head)
        dx = torch.empty_like(rows)
        z = rows.new_empty(min(chunk, len(rows)), len(head))
        for i in range(0, len(rows), chunk):
            part = rows[i : i + chunk]
            buffer = z[: len(part)]
            torch.mm(part, head.T, out=buffer)
            torch.mm(buffer, head, out=dx[i : i + chunk])
            dw.addmm_(buffer.T, part)


# What to call, and by how much its time is multiplied.
Provider = tuple[Callable[[], Any], float]


def providers(x: Inputs, args: argparse.Namespace) -> dict[str, Provider]:
    """By name."""
    v, n, device = x.head.shape[0], len(x.targets), x.head.device.type
    streams = len(x.hidden)
    dense = torch.zeros(n, v, device=x.head.device)
    dense[
        torch.repeat_interleave(torch.arange(n, device=device), x.lists.indptr.diff()),
        x.lists.tokens,
    ] = x.rewards
    table: dict[str, Provider] = {
        "bare GEMMs, whole": (lambda: bare(x, n * streams), 1),
        "bare GEMMs, chunked": (
            lambda: bare(x, max(64, (64 << 20) // (4 * v)) if device == "cpu" else 4096),
            1,
        ),
    }
    for backend in ["torch", "triton"] if device == "cuda" else ["torch"]:
        full, plain = (options(v, backend, args.workspace, **changes) for changes in ({}, PLAIN))
        table[f"ilrec_kernels {backend}"] = (partial(ours, x, full), 1)
        table[f"ilrec_kernels {backend}, CE + CPD only"] = (partial(ours, x, plain), 1)
    compiled = torch.compile(materialised)
    table["eager torch, materialised"] = (
        lambda: torch.autograd.backward(materialised(x.hidden, x.head, x.targets, dense)),
        1,
    )
    table["torch.compile, materialised"] = (
        lambda: torch.autograd.backward(compiled(x.hidden, x.head, x.targets, dense)),
        1,
    )
    few = min(n, 8)
    table["row loop (authors' form)"] = (lambda: row_loop(x, few), n / few)
    return table | (others(x, args) if device == "cuda" else {})


def others(x: Inputs, args: argparse.Namespace) -> dict[str, Provider]:
    """Liger's and Apple's Triton kernels, where they are installed."""
    table: dict[str, Provider] = {}
    teacher, head = x.hidden[0].detach(), x.head.detach()
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

        cross, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(jsd_beta=0.0)
        chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
        table["Liger fused linear cross-entropy, CE alone"] = (
            lambda: cross(x.head, x.hidden[0], x.targets).backward(),
            1,
        )
        table["Liger fused linear JSD, one layer's CPD"] = (
            lambda: jsd(x.hidden[1], x.head, teacher, head, x.targets).backward(),
            1,
        )
        table["Liger chunked JSD loss, one layer's CPD"] = (
            lambda: chunked(x.hidden[1], x.head, teacher, head, x.targets).backward(),
            1,
        )
        o = options(x.head.shape[0], "triton", args.workspace, **PLAIN)
        one = [teacher, x.hidden[1]]
        table["ilrec_kernels triton, CE + one layer's CPD"] = (
            lambda: ours(replace(x, hidden=one), o),
            1,
        )
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        table["cut-cross-entropy, CE alone"] = (
            lambda: linear_cross_entropy(x.hidden[0], x.head, x.targets).backward(),
            1,
        )
    return table


def timed(fn: Callable[[], Any], device: str) -> float:
    """Milliseconds."""
    if device == "cuda":
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def extra_bytes(fn: Callable[[], Any], x: Inputs) -> int:
    """Peak memory of one call beyond what stood before it, less the gradients."""
    for leaf in x.leaves():
        leaf.grad = None
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in x.leaves())
    if x.head.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - gradients
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak()
    before = status_mib("VmRSS")
    fn()
    return max(0, int(2**20 * (peak_mib() - before)) - gradients)


def measure(
    table: dict[str, Provider], x: Inputs, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, int]]:
    """(median milliseconds, extra bytes) by provider; one that has no memory left is
    dropped.
    """
    memory: dict[str, int] = {}
    for name, (fn, _) in list(table.items()):
        began = time.perf_counter()
        try:
            # The first call compiles, and makes what is made once.
            fn()
            memory[name] = extra_bytes(fn, x)
            note(f"warm-up: {name}, {time.perf_counter() - began:.1f} s")
        except torch.OutOfMemoryError:
            note(f"{name}: out of memory")
            del table[name]
    times: dict[str, list[float]] = {name: [] for name in table}
    # The providers take turns, so that drift of the machine falls on all alike.
    for repeat in range(args.repeats):
        began = time.perf_counter()
        for name, (fn, factor) in table.items():
            for leaf in x.leaves():
                leaf.grad = None
            times[name].append(timed(fn, args.device) * factor)
        note(f"round {repeat + 1} of {args.repeats}, {time.perf_counter() - began:.1f} s")
    return {name: statistics.median(values) for name, values in times.items()}, memory


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_shape(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    n, d, v, m = (int(s) for s in shape.split("x"))
    x = make_inputs((n, d, v, m), args.device, args.logits == "peaked")
    median, memory = measure(providers(x, args), x, args)
    limit = min(value for name, value in median.items() if name.startswith("bare"))
    flops = 3 * (m + 1) * 2 * n * d * v
    rows = []
    print(
        f"\n{shape} (N x d x V x m), {args.device}, {args.logits} logits\n"
        f"{'provider':<44}{'ms':>10}{'x bare':>8}{'TFLOP/s':>9}{'extra MiB':>11}"
    )
    for name, value in median.items():
        rows.append(
            {
                "shape": shape,
                "provider": name,
                "fwd_bwd_ms": value,
                "ratio_to_bare_gemm": value / limit,
                "extra_bytes": memory[name],
            }
        )
        print(
            f"{name:<44}{value:>10.1f}{value / limit:>8.2f}{flops / value / 1e9:>9.2f}"
            f"{memory[name] / 2**20:>11.0f}"
        )
    for name, value in median.items():
        if f"{name}, CE + CPD only" in median:
            print(
                f"{name}: negatives, CPO and CRR add "
                f"{100 * (value / median[f'{name}, CE + CPD only'] - 1):.1f} %"
            )
    return rows


def measured_machine(device: str) -> dict[str, Any]:
    if device == "cuda":
        machine = describe_machine(device=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    else:
        machine = describe_machine(threads=torch.get_num_threads())
    return dict(machine)


def main() -> None:
    parser = command_line(
        __doc__,
        "one small shape, under 50 seconds on two free cores",
        "python benchmarks/loss.py --shapes 2048x256x32000x3 --logits random --json loss.json",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--shapes", help="comma-separated N x d x V x m, as 2048x256x32000x3")
    parser.add_argument(
        "--logits",
        default="peaked",
        choices=["peaked", "random"],
        help="random: about half the vocabulary passes the threshold",
    )
    parser.add_argument("--workspace", type=int, help="bytes; default 64 MiB on CPU, 1 GiB on GPU")
    parser.add_argument("--repeats", type=int, help="default 30 on GPU, 5 on CPU, 3 with --quick")
    args = parser.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 30 if args.device == "cuda" else 5)
    shapes = CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    if args.shapes:
        shapes = args.shapes.split(",")
    elif args.quick:
        shapes = QUICK_SHAPES
    machine = measured_machine(args.device)
    print(machine_line(machine))
    rows = [row for shape in shapes for row in run_shape(shape, args)]
    write_figures(args.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
