"""What does a training step of a large model take on a GPU, beside `ilrec plan`?

    python benchmarks/training_step.py [--quick] [--json FILE]

`gpu.py` runs this as its last part. The model is a decoder of Llama-3.1-8B's shape, cut
to four layers, with 1,024 new item tokens; 96 sequences of 83 tokens a step, bf16, one
GPU. All weights are trained, or LoRA and the rows of the new tokens; by SFT or by
ILRec; the loss operator is torch's or Triton's. Weights and data are drawn.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from harness import command_line, describe_machine, machine_line, write_figures

# DeepSpeed chooses when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from ilrec_dist.config.load import config_from_dict  # noqa: E402
from ilrec_dist.config.tree import Config  # noqa: E402
from ilrec_dist.model.decoder import decoder_of  # noqa: E402
from ilrec_dist.model.hf.config import read_config  # noqa: E402
from ilrec_dist.model.utilisation import peak_of  # noqa: E402
from ilrec_dist.objective.registry import get_method  # noqa: E402
from ilrec_dist.plan.hardware import Hardware  # noqa: E402
from ilrec_dist.plan.memory import RESERVED  # noqa: E402
from ilrec_dist.plan.plan import Plan, plan_for  # noqa: E402
from ilrec_dist.plan.workload import DataSizes, ItemTokens  # noqa: E402
from ilrec_dist.testing.distributed import Mesh  # noqa: E402
from ilrec_dist.testing.measured_step import SmallTraining, StepSpec  # noqa: E402

Device = Literal["cpu", "cuda"]
GIB = 1 << 30
KINDS, METHODS = ("full", "lora+new_rows"), ("sft", "ilrec")
# Links are not used by one GPU.
UNUSED = 1.0


@dataclass(frozen=True)
class StepSizes:
    """A model's config.json, and the batch."""

    model: dict[str, Any]
    sequences: int
    items: int
    codes: int
    depth: int
    rank: int
    warmup: int
    repeats: int


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
FOUR_LAYERS = StepSizes(LLAMA, 96, 20, 256, 4, 16, 3, 10)
TINY = StepSizes(
    LLAMA
    | {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 500,
    },
    4,
    5,
    8,
    3,
    4,
    1,
    3,
)


@dataclass(frozen=True)
class StepRow:
    """Measured, and what the plan says; memory is None where there is no GPU."""

    what: str
    seconds: float
    tokens_per_second: float
    mfu: float
    # Of the loss operator, run alone, in the whole step.
    loss_share: float
    # The allocator's peak, and what of the device the process held.
    peak_memory: float | None
    held_memory: float | None
    planned_tokens_per_second: float
    planned_mfu: float
    # Without and with the plan's allowances for fragments, CUDA and NCCL.
    planned_memory: float
    planned_held_memory: float

    def line(self) -> str:
        memory = "memory of a GPU not measured"
        if self.peak_memory is not None and self.held_memory is not None:
            memory = (
                f"peak {self.peak_memory / GIB:.1f} GiB (plan {self.planned_memory / GIB:.1f}), "
                f"held {self.held_memory / GIB:.1f} GiB (plan {self.planned_held_memory / GIB:.1f})"
            )
        return (
            f"{self.what}: {self.tokens_per_second:,.0f} tokens/s (plan "
            f"{self.planned_tokens_per_second:,.0f}), MFU {100 * self.mfu:.1f} % (plan "
            f"{100 * self.planned_mfu:.1f}), loss {100 * self.loss_share:.0f} % of the step; "
            f"{memory}"
        )


def training_steps(device: Device, sizes: StepSizes) -> Iterator[StepRow]:
    """Yield the rows, one training after the other in this process."""
    hardware = measured_hardware(device, sizes)
    backends = ("torch", "triton") if device == "cuda" else ("torch",)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(sizes.model))
        for kind, method, backend in itertools.product(KINDS, METHODS, backends):
            config = configuration(sizes, folder, kind, method, backend)
            yield measured_row(f"{kind}, {method}, {backend}", config, sizes, device, hardware)


def configuration(sizes: StepSizes, folder: str, kind: str, method: str, backend: str) -> Config:
    """The run's configuration that such a training would have."""
    train = {
        "methods": [method],
        "trainable": kind,
        "batch_size": sizes.sequences,
        "max_history": sizes.items,
        "precision": "bf16",
    }
    # As many as the whole model has by default; SFT reads none.
    intermediate = {"num_intermediate_layers": 3} if method == "ilrec" else {}
    if kind != "full":
        train["lora"] = {"rank": sizes.rank}
    return config_from_dict(
        {
            "data": {"format": "csv", "path": "none.csv"},
            "items": {"levels": sizes.depth, "codes_per_level": sizes.codes},
            "backbone": {"from": folder},
            "objective": {"backend": backend} | intermediate,
            "train": train,
            "launch": {"workers": 1, "tp": 1},
        }
    )


def measured_row(
    what: str, config: Config, sizes: StepSizes, device: Device, hardware: Hardware
) -> StepRow:
    """Train some steps, and compare them with the plan."""
    new = sizes.depth * sizes.codes
    tokens = ItemTokens((sizes.codes,) * sizes.depth, new, "drawn")
    plan = plan_for(config, hardware, DataSizes(), tokens)
    pretrained = read_config(str(config.backbone.from_))
    spec = StepSpec(
        decoder_of(config.backbone, pretrained),
        get_method(config.train.methods[0]).objective(config.objective),
        config.train,
        pretrained.vocab_size + new,
        sizes.items,
        sizes.depth,
        new_rows=new,
        codes=sizes.codes,
        family="llama",
        device=device,
    )
    training = SmallTraining(lone_mesh(), spec)
    if device == "cuda":
        # The plan is of the steps, not of the start.
        torch.cuda.reset_peak_memory_stats()
    step = timed(training.step, sizes, device)
    peak, held = memory_of(device)
    alone = timed(training.loss_alone(), sizes, device)
    training.close()
    del training
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row(what, plan, step, alone, peak, held)


def row(
    what: str, plan: Plan, step: float, alone: float, peak: float | None, held: float | None
) -> StepRow:
    planned = sum(plan.training.values())
    allowances = plan.training["fragments"] + RESERVED
    asked = plan.time.model_operations
    return StepRow(
        what,
        step,
        plan.tokens_per_step / step,
        asked / (step * plan.hardware.peak),
        alone / step,
        peak,
        held,
        plan.tokens_per_step / plan.time.total,
        plan.time.mfu,
        planned - allowances,
        planned,
    )


def lone_mesh() -> Mesh:
    """One process; the groups are made by what trains in it."""
    none: Any = None
    return Mesh(0, 1, 1, none, none)


def timed(call: Callable[[], Any], sizes: StepSizes, device: Device) -> float:
    """The median of the seconds of a call."""
    seconds = []
    for repeat in range(sizes.warmup + sizes.repeats):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        if repeat >= sizes.warmup:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def wait(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_of(device: Device) -> tuple[float | None, float | None]:
    """The allocator's peak, and what the device has not free."""
    if device == "cpu":
        return None, None
    free, total = torch.cuda.mem_get_info()
    return float(torch.cuda.max_memory_allocated()), float(total - free)


def measured_hardware(device: Device, sizes: StepSizes) -> Hardware:
    """The speeds of this device that a plan asks for.

    The peak is the datasheet's where that of this GPU is known, else what bare
    products reach.
    """
    rows = sizes.sequences * ((sizes.items + 1) * sizes.depth - 1)
    hidden, ffn = sizes.model["hidden_size"], sizes.model["intermediate_size"]
    left = torch.randn(rows, hidden, device=device).bfloat16()
    right = torch.randn(hidden, ffn, device=device).bfloat16()
    # Too much for a cache, and written as well as read.
    block = torch.zeros((1 << 28) if device == "cuda" else (1 << 22), device=device)
    target = torch.empty_like(block)
    product = timed(lambda: left @ right, sizes, device)
    copy = timed(lambda: target.copy_(block), sizes, device)
    gemm = 2 * rows * hidden * ffn / product
    memory, peak = float(16 * GIB), None
    if device == "cuda":
        memory = float(torch.cuda.mem_get_info()[1])
        peak = peak_of(torch.cuda.get_device_name())
    return Hardware(
        nodes=1,
        gpus_per_node=1,
        gpu_memory=memory,
        interconnect=UNUSED,
        node_link=UNUSED,
        gemm=gemm,
        peak=peak or gemm,
        memory_bandwidth=2 * block.nbytes / copy,
        disk=UNUSED,
    )


def main() -> None:
    parser = command_line(__doc__, "tiny shapes, also on a CPU")
    arguments = parser.parse_args()
    # DeepSpeed looks for garbage several times where it begins, and what is imported stays.
    gc.freeze()
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        parser.error("no CUDA device; only --quick runs on a CPU")
    machine = describe_machine()
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    print(machine_line(machine))
    rows = []
    for measured in training_steps(device, TINY if arguments.quick else FOUR_LAYERS):
        print(measured.line(), flush=True)
        rows.append(asdict(measured))
        # After every row, so that a run that is cut short leaves what it has.
        write_figures(arguments.json, {"machine": machine, "training_steps": rows})


if __name__ == "__main__":
    main()
