"""Does `ilrec plan` say what a training takes, and what does a checkpoint cost?

    python benchmarks/cluster.py [--quick] [--json FILE]

Real steps in two processes, tp 1 × dp 2 and tp 2 × dp 1, of decoders of three sizes:
the bytes of weights, gradients, optimizer state and activations beside the plan's (at
most 10 % apart), and the bytes of the collectives (equal). All are bytes of tensors, so
another machine gives the same.

Then a checkpoint of the largest of them in bf16: how long the training waits for it,
and how much longer the steps beside its writing take, together at most 3 % of 200
steps; and its bytes on disk, at most 14 a parameter.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from typing import Any, Literal

from harness import command_line, describe_machine, machine_line, write_figures

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.testing.distributed import close_pools, run_distributed
from ilrec_dist.testing.measured_checkpoint import measure_checkpoint
from ilrec_dist.testing.measured_step import StepSpec, measure_step, reckoned_step
from ilrec_dist.training.config import TrainConfig

ERROR_LIMIT = 0.10
# Of the time between checkpoints, and of bytes a parameter.
STALL_LIMIT, CHECKPOINT_STEPS, BYTES_LIMIT = 0.03, 200, 14
PARTS = ("weights", "gradients", "master_weights", "moments", "activations")
LLAMA = BackboneConfig(
    normalization="RMSNorm",
    activation="swiglu",
    position_embedding="rope",
    bias=False,
    tie_embeddings=False,
    dropout=0.0,
)
# Layers, hidden size, heads, key/value heads, feed-forward size, vocabulary.
SIZES = {
    "tiny": (2, 64, 4, 2, 160, 257),
    "small": (4, 256, 8, 4, 704, 2_049),
    "medium": (8, 512, 8, 4, 1_408, 8_193),
}

# Precision, and micro-batches a step.
STEPS: tuple[tuple[Literal["fp32", "bf16"], int], ...] = (("fp32", 1), ("fp32", 2), ("bf16", 1))


def specs(quick: bool) -> dict[str, StepSpec]:
    found = {}
    for name, (layers, hidden, heads, kv_heads, ffn, vocab) in SIZES.items():
        if quick and name != "tiny":
            continue
        backbone = dataclasses.replace(
            LLAMA,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            ffn_hidden_size=ffn,
        )
        for precision, accumulation in STEPS:
            train = TrainConfig(
                batch_size=8 * accumulation, accumulation_steps=accumulation, precision=precision
            )
            found[f"{name} {precision} × {accumulation}"] = StepSpec(
                backbone, ObjectiveConfig(), train, vocab, items=10, depth=3
            )
    return found


def main() -> int:
    arguments = command_line(__doc__, "the smallest size only").parse_args()
    machine = describe_machine()
    print(machine_line(machine))
    figures: dict[str, Any] = {"machine": machine, "steps": {}}
    worst, unequal = 0.0, 0
    for name, spec in specs(arguments.quick).items():
        for tp in (1, 2):
            measured = run_distributed(measure_step, 2, tp, spec)[0]
            reckoned = reckoned_step(spec, tp, 2 // tp, measured.rows, measured.entries)
            row = {part: (getattr(measured, part), getattr(reckoned, part)) for part in PARTS}
            errors = {part: (plan - real) / real for part, (real, plan) in row.items()}
            worst = max(worst, *map(abs, errors.values()))
            same = measured.collectives == reckoned.collectives
            unequal += not same
            sent = sum(measured.collectives.values())
            shown = "  ".join(f"{part} {100 * error:+.1f} %" for part, error in errors.items())
            print(f"{name}, tp {tp}: {shown}  collectives {sent:,} B {'=' if same else '≠'} plan")
            figures["steps"][f"{name}, tp {tp}"] = {
                **row,
                "collectives": (dict(measured.collectives), dict(reckoned.collectives)),
            }
    figures["checkpoints"], missed = checkpoints(arguments.quick)
    close_pools()
    print(f"largest error of memory {100 * worst:.1f} %; unequal collectives: {unequal}")
    write_figures(arguments.json, figures)
    return int(worst > ERROR_LIMIT or unequal > 0 or missed)


def checkpoints(quick: bool) -> tuple[dict[str, Any], bool]:
    """What a checkpoint of the largest model costs, and whether that is too much."""
    name, spec = [(n, s) for n, s in specs(quick).items() if "bf16" in n][-1]
    rows, missed = {}, False
    for tp in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_distributed(measure_checkpoint, 2, tp, spec, folder)
        slowest = max(ranks, key=lambda rank: rank.held_up)
        interval = CHECKPOINT_STEPS * slowest.step_seconds
        share, size = slowest.held_up / interval, slowest.bytes / slowest.parameters
        missed |= share > STALL_LIMIT or size > BYTES_LIMIT
        print(
            f"checkpoint of {name}, {slowest.parameters / 1e6:.1f} million parameters, tp {tp}: "
            f"{size:.2f} B a parameter; waits {slowest.stall_seconds:.3f} s, "
            f"{slowest.writing_steps} steps beside the writing take "
            f"{slowest.writing_step_seconds:.3f} instead of {slowest.step_seconds:.3f} s: "
            f"{100 * share:.2f} % of {CHECKPOINT_STEPS} steps"
        )
        rows[f"{name}, tp {tp}"] = dataclasses.asdict(slowest) | {"share": share}
    return rows, missed


if __name__ == "__main__":
    sys.exit(main())
