"""Which of its figures does the loss operator reach on a GPU, and what does a training
step take? Correctness comes first.

    PYTHONPATH=kernels python benchmarks/gpu.py --json gpu.json

Needs torch and Triton, and no installation; Liger's row is left out where Liger is not
there, and so are the training steps (`training_step.py`, which runs alone as well)
where the project is not installed. The operator's figures take about ten minutes on an
H200. It ends with status 1, before anything is measured, when a backend disagrees with
the fp64 reference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ilrec_kernels import Backend, LossOptions, cross_layer_loss
from ilrec_kernels.plan import Plan, make_plan
from ilrec_kernels.problem import DenseSource, Problem
from torch import Tensor

# The tests import this file as a module, and then its folder is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import loss  # noqa: E402
from harness import command_line, machine_line, write_figures  # noqa: E402

# This shape is large enough that 8 MiB of workspace select regime V.
CHECKED = (2000, 64, 20_000, 3)
SMALL_WORKSPACE = 8 << 20
# The distillation and the softmax stay dense.
LISTED: dict[str, Any] = {"negative_scope": "valid_next"}


@dataclass(frozen=True)
class Sizes:
    """N x d x V x m of the figures, and the workspaces in bytes that they are given
    for.
    """

    dense: str = "8192x4096x131072x3"
    few_rows: str = "512x4096x131072x3"
    wide: str = "2048x4096x1048576x3"
    distilled: str = "8192x4096x128256x1"
    workspaces: tuple[int, ...] = (1 << 30, 2 << 30, 1 << 29)
    # With this workspace regime V meets the head a few times, with thousands of rows each.
    sliced_workspace: int = 3 << 27
    repeats: int = 30


@dataclass(frozen=True)
class Figure:
    """One row: `measured` against `goal`, an upper bound, or for a rate a lower one.

    Without a goal it is for information.
    """

    what: str
    measured: float
    goal: float | None = None
    higher_is_better: bool = False

    @property
    def reached(self) -> bool | None:
        return (
            None
            if self.goal is None
            else (
                self.measured >= self.goal if self.higher_is_better else self.measured <= self.goal
            )
        )

    def line(self) -> str:
        goal = "" if self.goal is None else f"{'≥' if self.higher_is_better else '≤'} {self.goal:g}"
        verdict = {None: "", True: "reached", False: "NOT REACHED"}[self.reached]
        return f"{self.what:<72}{self.measured:>10.3f}  {goal:<8}{verdict}"


def gradients(x: loss.Inputs, o: LossOptions) -> list[Tensor]:
    """The loss and the gradients of all leaves, fp64."""
    for leaf in x.leaves():
        leaf.grad = None
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
    return [out.loss.detach().double(), *(leaf.grad.double() for leaf in x.leaves())]


def distances(
    device: str, backend: str, shape: tuple[int, int, int, int] = CHECKED
) -> Iterator[tuple[str, float, float]]:
    """Yield (what, distance of loss and gradients from the reference, its bound).

    The distance is the largest ‖Δ‖ / ‖reference‖ of a tensor.
    """
    drawn = loss.make_inputs(shape, device, peaked=True)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        x = replace(
            drawn,
            hidden=[h.detach().to(dtype).requires_grad_() for h in drawn.hidden],
            head=drawn.head.detach().to(dtype).requires_grad_(),
        )
        for what, workspace, changes in (
            ("dense scopes", None, {}),
            ("listed negatives", None, LISTED),
            ("listed negatives, small workspace", SMALL_WORKSPACE, LISTED),
            ("dense scopes, small workspace", SMALL_WORKSPACE, {}),
        ):
            o = loss.options(shape[2], backend, workspace, **changes)
            pairs = zip(
                gradients(x, o), gradients(x, replace(o, backend=Backend.REFERENCE)), strict=True
            )
            yield (
                f"{what}, {str(dtype).removeprefix('torch.')}",
                max(float((a - b).norm() / b.norm()) for a, b in pairs),
                bound,
            )


def figures(device: str, backend: str, sizes: Sizes) -> Iterator[Figure]:
    """Yield the figures; each shape's inputs are made once.

    What is compared is timed in turn, so that drift of the machine falls on all alike.
    """
    x = inputs(sizes.dense, device)
    v = x.head.shape[0]
    for workspace in sizes.workspaces:
        times = medians(
            {"ours": whole(x, loss.options(v, backend, workspace))} | bare(x),
            x,
            device,
            sizes.repeats,
        )
        ratio = times["ours"] / min(times["whole"], times["chunked"])
        yield Figure(
            f"{sizes.dense}, workspace {workspace >> 20} MiB: × the bare products",
            ratio,
            1.18 if workspace >= 1 << 30 else 1.30,
        )
    first = sizes.workspaces[0]
    parts = {
        "full": whole(x, loss.options(v, backend, first)),
        "plain": whole(x, loss.options(v, backend, first, **loss.PLAIN)),
    }
    times = medians(parts, x, device, sizes.repeats)
    yield Figure(
        f"{sizes.dense}: negatives, CPO and CRR over CE and CPD, %",
        100 * (times["full"] / times["plain"] - 1),
        5.0,
    )
    sliced = loss.options(v, backend, sizes.sliced_workspace, **LISTED)
    check_sliced(x, sliced)
    n, d = x.hidden[0].shape
    milliseconds = medians({"forward": forward(x, sliced)}, x, device, sizes.repeats)["forward"]
    yield Figure(
        f"{sizes.dense}, regime V forward: TFLOP/s",
        len(x.hidden) * 2 * n * d * v / milliseconds / 1e9,
        450.0,
        higher_is_better=True,
    )
    del x
    x = inputs(sizes.few_rows, device)
    dense = {
        name: run
        for name, (run, _) in loss.providers(x, namespace(device, sizes.repeats)).items()
        if "materialised" in name
    }
    times = medians(
        {"ours": whole(x, loss.options(v, backend, None))} | dense, x, device, sizes.repeats
    )
    for name in dense:
        # What did not fit has no time.
        if name in times:
            yield Figure(f"{sizes.few_rows}: × {name}", times["ours"] / times[name], 1.0)
    del x, dense
    x = inputs(sizes.wide, device)
    times = medians(
        {"ours": whole(x, loss.options(x.head.shape[0], backend, None, **LISTED))} | bare(x),
        x,
        device,
        max(3, sizes.repeats // 10),
    )
    yield Figure(
        f"{sizes.wide}, listed negatives: × the bare products",
        times["ours"] / min(times["whole"], times["chunked"]),
    )
    del x
    x = inputs(sizes.distilled, device)
    theirs = {
        name: run
        for name, (run, _) in loss.others(x, namespace(device, sizes.repeats)).items()
        if "CPD" in name
    }
    if theirs:
        times = medians(theirs, x, device, sizes.repeats)
        ours = next(value for name, value in times.items() if name.startswith("ilrec_kernels"))
        rival = min(value for name, value in times.items() if not name.startswith("ilrec_kernels"))
        yield Figure(
            f"{sizes.distilled}: Liger's JSD ÷ our CE + CPD",
            rival / ours,
            3.0,
            higher_is_better=True,
        )


def plan_of(x: loss.Inputs, o: LossOptions) -> Plan:
    hidden = tuple(h.detach() for h in x.hidden)
    return make_plan(Problem(hidden, x.head, x.targets, x.lists, x.rewards, o, 0, x.head.shape[0]))


def check_sliced(x: loss.Inputs, o: LossOptions) -> None:
    """Check that the figure of regime V is of regime V, where the workspace suits it.

    Other backends have none.
    """
    plan = plan_of(x, o)
    if o.backend is Backend.TRITON and not (
        plan.source is DenseSource.SLICES
        and plan.chunk_rows * 4 >= len(x.targets)
        and plan.slice_columns >= 512
    ):
        raise RuntimeError(
            f"regime V: expected at most 4 chunks with slices of 512 columns or more, got {plan}"
        )


def inputs(shape: str, device: str) -> loss.Inputs:
    n, d, v, m = (int(s) for s in shape.split("x"))
    return loss.make_inputs((n, d, v, m), device, peaked=True)


def whole(x: loss.Inputs, o: LossOptions) -> Callable[[], None]:
    return lambda: loss.ours(x, o)


def forward(x: loss.Inputs, o: LossOptions) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            cross_layer_loss(x.hidden[0], x.hidden[1:], x.head, x.targets, x.lists, x.rewards, o)

    return run


def bare(x: loss.Inputs) -> dict[str, Callable[[], None]]:
    return {
        "whole": lambda: loss.bare(x, len(x.targets) * len(x.hidden)),
        "chunked": lambda: loss.bare(x, 4096),
    }


def namespace(device: str, repeats: int) -> argparse.Namespace:
    return argparse.Namespace(device=device, repeats=repeats, workspace=None)


def medians(
    calls: dict[str, Callable[[], Any]], x: loss.Inputs, device: str, repeats: int
) -> dict[str, float]:
    """Milliseconds."""
    providers = {name: (call, 1) for name, call in calls.items()}
    milliseconds: dict[str, float]
    milliseconds, _ = loss.measure(providers, x, namespace(device, repeats))
    return milliseconds


def training_steps(quick: bool) -> list[dict[str, Any]]:
    """The rows of `training_step.py`, in a process of its own; none where the project
    is not installed.
    """
    if any(find_spec(name) is None for name in ("ilrec_dist", "deepspeed", "megatron")):
        print("training steps: left out, the project is not installed")
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steps.json")
        script = str(Path(__file__).with_name("training_step.py"))
        arguments = [sys.executable, script, "--json", str(path), *["--quick"] * quick]
        subprocess.run(arguments, check=True)
        rows: list[dict[str, Any]] = json.loads(path.read_text())["training_steps"]
        return rows


def main() -> None:
    parser = command_line(__doc__, "training steps of tiny shapes alone, also on a CPU")
    parser.add_argument(
        "--check-only", action="store_true", help="compare with the reference and measure nothing"
    )
    args = parser.parse_args()
    if args.quick:
        write_figures(args.json, {"training_steps": training_steps(quick=True)})
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device; on a CPU run benchmarks/loss.py")
    machine = loss.measured_machine("cuda")
    print(machine_line(machine))
    wrong = 0
    for backend in ("torch", "triton"):
        for what, distance, bound in distances("cuda", backend):
            wrong += not distance <= bound
            print(
                f"{backend}, {what}: {distance:.1e} from the reference, "
                f"{'ok' if distance <= bound else f'MORE THAN {bound:.0e}'}",
                flush=True,
            )
    if wrong:
        sys.exit(f"{wrong} of the comparisons above failed; nothing is measured")
    if args.check_only:
        return
    rows = []
    for figure in figures("cuda", "triton", Sizes()):
        rows.append(asdict(figure) | {"reached": figure.reached})
        print(figure.line(), flush=True)
        # The file is written after every row, so that a run that is cut short leaves what it has.
        write_figures(args.json, {"machine": machine, "figures": rows})
    # The process that trains has the GPU's memory for itself.
    torch.cuda.empty_cache()
    steps = training_steps(quick=False)
    write_figures(args.json, {"machine": machine, "figures": rows, "training_steps": steps})


if __name__ == "__main__":
    main()
