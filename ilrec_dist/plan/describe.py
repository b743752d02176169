"""The plan as text: what a team reads before it pays for the cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.host import keeps_index_on_gpu
from ilrec_dist.plan.plan import ACTIVATIONS, Plan
from ilrec_dist.plan.trained import fullest_rank

BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def describe(plan: Plan) -> str:
    """All sections, one line a number."""
    return "\n".join(_lines(plan)) + "\n"


def size(value: float) -> str:
    """`12.3 GiB`."""
    for unit in BINARY_UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {BINARY_UNITS[-1]}"


def _lines(plan: Plan) -> Iterator[str]:
    hardware, layout, batch = plan.hardware, plan.layout, plan.batch
    yield (
        f"{hardware.nodes} × {hardware.gpus_per_node} GPUs of {size(hardware.gpu_memory)}: "
        f"tp {layout.tp} × dp {layout.dp}, {plan.config.train.precision}, "
        f"ZeRO {layout.zero_stage}; {plan.method}"
    )
    limit = f"{batch.tokens:,} tokens, packed; " if batch.is_packed else ""
    yield (
        f"a micro-batch: {limit}{batch.sequences} sequences of at most {batch.tokens_per_sequence} "
        f"tokens, {batch.rows:,} response rows; {layout.accumulation_steps} a step and rank"
    )
    yield (
        f"vocabulary: {plan.sizes.vocab:,} rows, {plan.tokens.new_tokens:,} of them item tokens "
        f"({plan.tokens.source}); {plan.tokens.depth} tokens an item"
    )
    yield from _parameters(plan)
    yield from _parts("memory of a GPU in training", plan.training)
    yield _with_other("train.recompute", not plan.config.train.recompute, plan.other_recompute)
    if plan.other_sequence_parallel is not None:
        value = not plan.config.launch.sequence_parallel
        yield _with_other("launch.sequence_parallel", value, plan.other_sequence_parallel)
    yield from _parts("memory of a GPU in validation", plan.validation)
    yield from _communication(plan)
    yield from _host(plan)
    yield from _checkpoint(plan)
    yield from _speed(plan)


def _parameters(plan: Plan) -> Iterator[str]:
    """The fullest rank's; only it may have rows of added tokens."""
    counted, rank = plan.parameters, fullest_rank(plan.parameters, plan.layout.tp)
    yield from ("", f"{'parameters':38}{'whole model':>16}{'a GPU':>18}")
    parts = list(dict.fromkeys(parameter.part for parameter in counted))
    named = [
        (part, [parameter for parameter in counted if parameter.part == part]) for part in parts
    ]
    named += [
        ("all", counted),
        ("trained", [parameter for parameter in counted if parameter.is_trained]),
    ]
    for name, chosen in named:
        total = sum(parameter.total for parameter in chosen)
        of_rank = sum(parameter.ranks[rank] for parameter in chosen)
        yield f"  {name:36}{total:>16,}{of_rank:>18,}"


def _parts(title: str, parts: Mapping[str, float]) -> Iterator[str]:
    yield from ("", title)
    for name, value in parts.items():
        yield f"  {name:60}{size(value):>12}"
    yield f"  {'all':60}{size(sum(parts.values())):>12}"


def _with_other(key: str, value: bool, parts: Mapping[str, float]) -> str:
    """What another value of a key would take."""
    return (
        f"  with {key}={str(value).lower()}: activations {size(parts[ACTIVATIONS])}, "
        f"all {size(sum(parts.values()))}"
    )


def _communication(plan: Plan) -> Iterator[str]:
    yield from (
        "",
        "bytes of a step's collectives" + " " * 19 + f"{'tensor':>12}{'sent by a rank':>16}",
    )
    for item in plan.collectives:
        what = f"{item.group} {item.ranks}: {item.what}, {item.operation.replace('_', '-')}"
        yield f"  {what:46}{size(item.bytes):>12}{size(item.wire_bytes):>16}"
    if not plan.collectives:
        yield "  none: one GPU"


def _host(plan: Plan) -> Iterator[str]:
    if plan.host is None:
        yield from (
            "",
            "memory of a node's host: the size of the data is not known yet; give --items, --users "
            "and --interactions, or run `ilrec prepare` first",
        )
        if plan.data.items is None and keeps_index_on_gpu(plan.config.cf):
            yield "the GPUs' memory is without their flat index (cf.reward_index): give --items"
        return
    yield from _parts("memory of a node's host, libraries left out", plan.host)


def _checkpoint(plan: Plan) -> Iterator[str]:
    kept = plan.config.train.keep_checkpoints
    is_whole = plan.trained.all_weights
    weights = "best and final weights" if is_whole else "adapters and added rows as best and final"
    yield from (
        "",
        f"a checkpoint: {size(plan.checkpoint)}, {plan.checkpoint_seconds:.0f} s at "
        f"{size(plan.hardware.disk)}/s, every {plan.config.train.steps_between_checkpoints} steps",
        f"on disk: {size((kept + 1) * plan.checkpoint + 2 * plan.weights)} a training at its "
        f"fullest: {kept} checkpoints, one in the making, {weights}",
    )


def _speed(plan: Plan) -> Iterator[str]:
    time, hardware = plan.time, plan.hardware
    yield from ("", "predicted seconds of a step; nothing is taken to overlap")
    for name, value in (
        ("matrix products", time.products),
        ("tensor-parallel collectives", time.tensor_parallel),
        ("data-parallel collectives", time.data_parallel),
        ("optimizer's update", time.update),
        ("all", time.total),
    ):
        yield f"  {name:60}{value:>12.4f}"
    per_second = plan.tokens_per_step / time.total
    yield (
        f"  {per_second:,.0f} tokens/s, {per_second / hardware.gpus:,.0f} a GPU, "
        f"MFU {100 * time.mfu:.1f} %"
    )
    yield f"  stated: {_speeds(hardware)}"


def _speeds(hardware: Hardware) -> str:
    tera, giga = 1e12, 1e9
    return (
        f"GEMM {hardware.gemm / tera:g} of {hardware.peak / tera:g} TFLOP/s a GPU, memory "
        f"{hardware.memory_bandwidth / tera:g} TB/s, links {hardware.node_link / giga:g} GB/s in a "
        f"node and {hardware.interconnect / giga:g} GB/s between nodes, disk "
        f"{hardware.disk / giga:g} GB/s"
    )
