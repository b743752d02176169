"""What does training and serving a language model cost, beside Hugging Face's Trainer
and PEFT?

    python benchmarks/llm.py [ROW ...] [--quick] [--json FILE] [--model FOLDER]
        [--data FOLDER] [--index FILE]

The model has SmolLM2-135M's shape, with random weights unless --model names a folder.
Items with 4 × 256 codes and histories are drawn unless --data names a data set in
LC-Rec's form with codes of four levels; the words of prompts always are. Every side of
a comparison runs in a process of its own, the sides by turns, and its figures are
medians over steps (of histories of all lengths: all their time over all their targets),
in CPU seconds of all threads, so that other work on the machine counts little. Memory
is the kernel's peak of the whole process. Hugging Face's trainings need peft and
accelerate (pip install --no-deps peft accelerate). The memory of loading a model under
tensor parallelism is hf_load.py's question.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import (
    command_line,
    describe_machine,
    in_own_process,
    machine_line,
    peak_mib,
    write_figures,
)
from llm_sides import DTYPES, FORMS, LEVELS, SIDES, Drawn, Spec

from ilrec_dist.launch.device import quiet
from ilrec_dist.launch.job import FOR_WORKERS

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


# train.micro_batch_tokens of the row that has one.
BUDGET = 256


@dataclass(frozen=True)
class Comparison:
    """Two sides, as changes of the common Spec."""

    about: str
    unit: str
    first: dict[str, Any]
    second: dict[str, Any]
    # Steps of histories of all lengths differ: all their time over all their targets counts.
    in_all: bool = False


def prompts(tokens: int, batch: int, **more: Any) -> dict[str, Any]:
    """Prompts of that many tokens, the item included."""
    return {"prompt": tokens - LEVELS, "batch": batch, **more}


def against_generate(tokens: int) -> Comparison:
    shape = {"prompt": tokens, "trainable": "full"}
    first, second = {"side": "our beams", "batch": 64}, {"side": "generate", "batch": 1}
    about = f"20 beams after {tokens} tokens, against generate"
    return Comparison(about, "user", shape | first, shape | second)


def against_peft(tokens: int, like_for_like: bool) -> Comparison:
    peft = prompts(tokens, 8, side="peft")
    if like_for_like:
        about = f"the same prompts of {tokens} tokens, against PEFT"
        return Comparison(about, "target", prompts(tokens, 8), peft)
    about = f"targets: all, against PEFT's prompts of {tokens} tokens"
    return Comparison(about, "target", {}, peft)


def against_form(name: str, like_for_like: bool) -> Comparison:
    prompts = {"form": name, "batch": FORMS[name].batch, "steps": 24}
    peft = prompts | {"side": "peft"}
    if like_for_like:
        about = f"the same prompts, in the form of {name}, against PEFT"
        return Comparison(about, "target", prompts, peft, in_all=True)
    about = f"targets: all, against PEFT's prompts in the form of {name}"
    return Comparison(about, "target", {"steps": 24}, peft, in_all=True)


COMPARISONS = {
    "targets-lcrec": against_form("lcrec", False),
    "targets-minionerec": against_form("minionerec", False),
    "like-lcrec": against_form("lcrec", True),
    "like-minionerec": against_form("minionerec", True),
    "targets-54": against_peft(54, False),
    "targets-104": against_peft(104, False),
    "like-54": against_peft(54, True),
    "like-104": against_peft(104, True),
    "beams-100": against_generate(100),
    "beams-300": against_generate(300),
    "lora": Comparison("LoRA and new rows, against full", "target", {}, {"trainable": "full"}),
    "recompute": Comparison(
        "full, layers computed again, against kept",
        "target",
        {"trainable": "full", "recompute": True},
        {"trainable": "full"},
    ),
    "micro-batches": Comparison(
        f"full, micro-batches of {BUDGET} tokens, against whole steps",
        "target",
        {"trainable": "full", "micro_batch_tokens": BUDGET},
        {"trainable": "full"},
    ),
    "packing": Comparison(
        "packed prompts of 17 to 54 tokens, against padded",
        "target",
        prompts(54, 16, ragged=True),
        prompts(54, 16, ragged=True, packs=False),
    ),
}
# Rows that one process measures by turns.
SINGLE = {"methods": "ILRec's step and SFT's", "operator": "the loss alone"}


def run_side(spec: Spec, **changes: Any) -> dict[str, Any]:
    """Measure in a process of its own."""
    words = vars(spec) | changes
    # As the product starts its workers.
    environment = {} if words["side"] in ("peft", "generate") else FOR_WORKERS
    figures: dict[str, Any] = in_own_process(
        __file__, "--side", json.dumps(words), threads=spec.threads, **environment
    )
    return figures


def compare(spec: Spec, rounds: int, row: Comparison) -> dict[str, Any]:
    """Both sides by turns; medians, or the whole, of all steps."""
    cpu: dict[str, list[float]] = {"first": [], "second": []}
    targets: dict[str, list[float]] = {"first": [], "second": []}
    peak: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(rounds):
        for name, changes in (("first", row.first), ("second", row.second)):
            measured = run_side(spec, **changes)
            cpu[name] += measured["cpu_s"]
            peak[name].append(measured["peak_mib"])
            targets[name] += measured.get("targets", [])
    seconds = {
        name: statistics.fmean(values, targets[name]) if row.in_all else statistics.median(values)
        for name, values in cpu.items()
    }
    memory = {name: max(values) for name, values in peak.items()}
    print(
        f"{row.about:<56}{seconds['first']:>8.3f}{seconds['second']:>9.3f} CPU s a {row.unit:<7}"
        f"{seconds['second'] / seconds['first']:>7.2f} ×{memory['first'] / 1024:>7.2f}"
        f"{memory['second'] / 1024:>6.2f} GiB{memory['first'] / memory['second']:>6.2f} ×",
        flush=True,
    )
    return {
        "cpu_s": cpu,
        "peak_mib": memory,
        "times": seconds["second"] / seconds["first"],
        "memory_share": memory["first"] / memory["second"],
    }


def single(spec: Spec, row: str) -> dict[str, Any]:
    measured = run_side(spec, side=row)
    figures = {
        name: statistics.median(values)
        for name, values in measured.items()
        if isinstance(values, list)
    }
    print(f"{SINGLE[row]}: {', '.join(f'{k} {v:.3f}' for k, v in figures.items())}", flush=True)
    if row == "methods":
        print(f"  ILRec's step is {figures['ilrec_cpu_s'] / figures['sft_cpu_s']:.3f} × SFT's")
    else:
        for name, seconds in figures.items():
            if name.startswith("products_"):
                loss = name.removeprefix("products_")
                print(f"  {loss} is {figures[loss] / seconds:.2f} × its bare products")
    return measured | {"medians": figures}


def write_random_model(folder: Path, layers: int) -> Path:
    # Loaded where no --model is given.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SMOLLM2 | {"num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


def main() -> None:
    parser = command_line(__doc__, "a third of the layers, few steps: some minutes on two cores")
    names = {name: row.about for name, row in COMPARISONS.items()} | SINGLE
    lines = "; ".join(f"{name}: {about}" for name, about in names.items())
    parser.add_argument("rows", metavar="ROW", nargs="*", help=f"(default: all) {lines}")
    parser.add_argument("--model", type=Path, help="the folder of a Llama (default: random)")
    parser.add_argument("--data", help="the folder of a data set in LC-Rec's form (default: drawn)")
    parser.add_argument(
        "--index", help="its codes (default: NAME.index.json beside NAME.inter.json)"
    )
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        quiet()
        spec = Spec(**json.loads(arguments.side))
        torch.set_num_threads(spec.threads)
        figures = SIDES[spec.side](spec, Drawn(spec))
        print(json.dumps(figures | {"peak_mib": peak_mib()}), flush=True)
        # Interpreter shutdown with live gloo groups can hang.
        os._exit(0)
    unknown = sorted(set(arguments.rows) - names.keys())
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}; expected some of {', '.join(names)}")
    machine = describe_machine(precision=arguments.precision, threads=arguments.threads)
    print(machine_line(machine), flush=True)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="llm-") as folder:
        layers = SMOLLM2["num_hidden_layers"] // (3 if arguments.quick else 1)
        model = arguments.model or write_random_model(Path(folder), layers)
        steps, batch, rounds = (2, 16, 1) if arguments.quick else (3, 32, 2)
        spec = Spec("ours", str(model), arguments.precision, arguments.threads, steps, batch)
        spec = replace(spec, data=arguments.data, index=arguments.index)
        for name in arguments.rows or names:
            row = COMPARISONS.get(name)
            rows[name] = single(spec, name) if row is None else compare(spec, rounds, row)
            write_figures(arguments.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
