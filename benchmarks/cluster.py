"""Does `ilrec plan` say what a training takes, and what does a checkpoint cost?

    python benchmarks/cluster.py [--quick] [--json FILE]

Real steps of decoders of three sizes, dp 2 and tp 1 or 2: all weights trained, or LoRA
and the rows of added tokens of a model of random weights; ZeRO 1, 2 and 3; with and
without recomputation, and with tokens cut over tp 2. For one of the sizes also bf16,
accumulated micro-batches, a lone data-parallel rank, adapters or rows alone, and packed
sequences of several lengths.
The bytes of weights (with what is gathered of them under ZeRO 3), gradients, optimizer
state and activations stand beside the plan's (at most 10 % apart), and the bytes of the
collectives and of a checkpoint (equal). All are bytes of tensors, so another machine
gives the same.

Then a checkpoint of the largest of them in bf16: how long the training waits for it,
and how much longer the steps beside its writing take, together at most 3 % of 200
steps; and its bytes on disk, at most 14 a parameter.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import command_line, describe_machine, machine_line, write_figures

from ilrec_dist.model.config import BackboneConfig, LoraConfig
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.testing.distributed import close_pools, run_distributed
from ilrec_dist.testing.measured_checkpoint import measure_checkpoint
from ilrec_dist.testing.measured_step import StepSpec, measure_step, write_model
from ilrec_dist.testing.reckoned_step import reckoned_step
from ilrec_dist.training.config import TrainConfig

ERROR_LIMIT = 0.10
# Of the time between checkpoints, and of bytes a parameter.
STALL_LIMIT, CHECKPOINT_STEPS, BYTES_LIMIT = 0.03, 200, 14
PARTS = ("weights", "gathered", "gradients", "master_weights", "moments", "activations")
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

# The size that is measured in every variant.
VARIED = "small"
LORA = LoraConfig(rank=8)
# The layouts: tp and dp.
LAYOUTS = ((1, 2), (2, 2))


def sized(name: str) -> StepSpec:
    """All weights of a decoder of this size, in fp32."""
    layers, hidden, heads, kv_heads, ffn, vocab = SIZES[name]
    backbone = dataclasses.replace(
        LLAMA,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=ffn,
    )
    train = TrainConfig(batch_size=8, lora=LORA)
    # An eighth of the tokens are new ones.
    return StepSpec(backbone, ObjectiveConfig(), train, vocab, 10, 3, new_rows=vocab // 8)


def specs(name: str, folder: Path) -> Iterator[tuple[str, StepSpec, tuple[int, int]]]:
    """(what, step, layout) of the steps of a size, with its model in the folder."""
    scratch = sized(name)
    model = folder / name
    run_distributed(write_model, 2, 1, scratch, str(model))
    loaded = dataclasses.replace(scratch, model=str(model))

    def step(kind: str, **keys: Any) -> StepSpec:
        spec = scratch if kind == "full" else loaded
        accumulation = keys.get("accumulation_steps", 1)
        keys |= {"trainable": kind, "batch_size": 8 * accumulation}
        return dataclasses.replace(spec, train=dataclasses.replace(spec.train, **keys))

    for kind, zero, recompute, layout in itertools.product(
        ("full", "lora+new_rows"), (1, 2, 3), (False, True), LAYOUTS
    ):
        what = f"{kind}, ZeRO {zero}{', recomputed' * recompute}"
        yield what, step(kind, zero_stage=zero, recompute=recompute), layout
    for kind, recompute in itertools.product(("full", "lora+new_rows"), (False, True)):
        what = f"{kind}, ZeRO 1{', recomputed' * recompute}, tokens cut"
        yield what, cut(step(kind, recompute=recompute)), (2, 2)
    if name != VARIED:
        return
    for kind, zero, layout in itertools.product(("full", "lora+new_rows"), (1, 2, 3), LAYOUTS):
        spec = step(kind, zero_stage=zero, precision="bf16", accumulation_steps=2)
        yield f"{kind}, ZeRO {zero}, bf16 × 2", spec, layout
        if kind == "full":
            spec = step(kind, zero_stage=zero, accumulation_steps=2)
            yield f"{kind}, ZeRO {zero}, fp32 × 2", spec, layout
    for kind, layout in itertools.product(("lora", "new_rows"), LAYOUTS):
        yield f"{kind}, ZeRO 1", step(kind), layout
    rate = step("full", new_rows_learning_rate=1e-3)
    yield "full, rows apart, ZeRO 1", dataclasses.replace(rate, model=str(model)), (2, 2)
    for kind in ("full", "lora+new_rows"):
        yield f"{kind}, ZeRO 1", step(kind), (2, 1)
        packed = dataclasses.replace(step(kind), packs=True)
        yield f"{kind}, ZeRO 1, packed", packed, (2, 2)
        yield f"{kind}, ZeRO 1, packed, tokens cut", cut(packed), (2, 2)
        spec = cut(step(kind, precision="bf16", accumulation_steps=2))
        yield f"{kind}, ZeRO 1, bf16 × 2, tokens cut", spec, (2, 2)


def cut(spec: StepSpec) -> StepSpec:
    """The step with sequence parallelism."""
    return dataclasses.replace(spec, sequence_parallel=True)


def main() -> int:
    arguments = command_line(__doc__, "the smallest size only").parse_args()
    machine = describe_machine()
    print(machine_line(machine))
    figures: dict[str, Any] = {"machine": machine, "steps": {}}
    worst, unequal = 0.0, 0
    sizes = ["tiny"] if arguments.quick else list(SIZES)
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            for what, spec, (tp, dp) in specs(size, Path(folder)):
                name = f"{size}, {what}, tp {tp} × dp {dp}"
                row, error, same = compared(name, spec, tp, dp)
                worst, unequal = max(worst, error), unequal + (not same)
                figures["steps"][name] = row
    print(f"largest error of memory {100 * worst:.1f} %; unequal collectives: {unequal}")
    largest = sized(sizes[-1])
    spec = dataclasses.replace(largest, train=dataclasses.replace(largest.train, precision="bf16"))
    figures["checkpoints"], missed = checkpoints(sizes[-1], spec)
    close_pools()
    write_figures(arguments.json, figures)
    return int(worst > ERROR_LIMIT or unequal > 0 or missed)


def compared(name: str, spec: StepSpec, tp: int, dp: int) -> tuple[dict[str, Any], float, bool]:
    """(figures, largest error of memory, whether
    bytes of collectives and checkpoint are equal).

    Each part's most over the ranks is compared with that of the plan's fullest rank,
    and the collectives of a rank of that tensor-parallel place.
    """
    ranks = run_distributed(measure_step, tp * dp, tp, spec)
    fullest = max(ranks, key=lambda rank: rank.moments)
    reckoned = reckoned_step(spec, tp, dp, fullest.rows, fullest.entries)
    row: dict[str, Any] = {
        part: (max(getattr(rank, part) for rank in ranks), getattr(reckoned, part))
        for part in PARTS
    }
    errors = {part: (plan - real) / max(real, 1) for part, (real, plan) in row.items()}
    checkpoint = sum(rank.checkpoint for rank in ranks), reckoned.checkpoint
    same = fullest.collectives == reckoned.collectives and checkpoint[0] == checkpoint[1]
    shown = "  ".join(f"{part} {100 * error:+.1f} %" for part, error in errors.items())
    sent = sum(fullest.collectives.values())
    print(f"{name}: {shown}  collectives {sent:,} B {'=' if same else '≠'} plan", flush=True)
    row["checkpoint"] = checkpoint
    row["collectives"] = dict(fullest.collectives), dict(reckoned.collectives)
    return row, max(map(abs, errors.values())), same


def checkpoints(name: str, spec: StepSpec) -> tuple[dict[str, Any], bool]:
    """What a checkpoint of a model costs, and whether that is too much."""
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
            f"{100 * share:.2f} % of {CHECKPOINT_STEPS} steps; written in {slowest.seconds:.2f} s, "
            f"read again in {slowest.restore_seconds:.2f} s"
        )
        rows[f"{name}, tp {tp}"] = dataclasses.asdict(slowest) | {"share": share}
    return rows, missed


if __name__ == "__main__":
    sys.exit(main())
