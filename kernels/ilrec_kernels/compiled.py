"""Every form in which the dispatcher launches a Triton kernel, for compiling them without a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ilrec_kernels import dense_triton


@dataclass(frozen=True)
class Variant:
    """A kernel, its arguments' types by name (constants as "constexpr"), its constants and its launch options."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    attributes: dict[tuple[int], list[list[Any]]]  # arguments that are multiples of 16, as Triton finds out at launch


def _variant(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, aligned: Iterable[str] = ()) -> Variant:
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    name = kernel.__name__ + "".join(f" {k}={v}" for k, v in constants.items())
    attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned if argument not in constants}
    name += " aligned" if attributes else ""
    return Variant(name, kernel, signature, constants, {"num_warps": warps}, attributes)


def _row_variants(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, ones: Iterable[str]) -> Iterator[Variant]:
    """A row kernel as Triton specialises it at launch: for sizes of which nothing is known; and for a vocabulary that is a multiple of 16, with
    pointers, strides and column ranges that are as well. Arguments in `ones` are then 1, which Triton makes a constant."""
    yield _variant(kernel, types, constants, warps)
    given = {**constants, **dict.fromkeys(ones, 1)}
    loose = ("m", "pack", "layers") if kernel is dense_triton.gate_kernel else ("m", "pack")
    yield _variant(kernel, types, given, warps, aligned=[name for name in kernel.arg_names if name not in given and name not in loose])


def variants() -> Iterator[Variant]:
    """All of them: each tile of layers, each combination of terms, each dtype the gradients are stored in."""
    single = {"final": "*fp32", "layers": "*fp32", "out": "*fp32"}
    terms = [(True, False), (True, True), (False, True)]
    for (layers, config), (softmax, distill) in itertools.product(dense_triton.CONFIGS.items(), terms):
        if not distill and layers > 1:
            continue
        few = ["m"] if layers == 1 and distill else []
        shape = {"SOFTMAX": softmax, "DISTILL": distill, "M": layers, "BLOCK": config.block}
        for exclude in (False, True) if softmax else (False,):
            sent = "*i8" if exclude else "*fp32"
            yield from _row_variants(dense_triton.statistics_kernel, {**single, "sent": sent}, {**shape, "EXCLUDE": exclude}, config.warps, few)
        for low in ("*fp32", "*bf16"):
            types = {**single, "final_out": low, "layers_out": low, "factors": "*fp32", "targets": "*i64"}
            ones = [*few, "pack"] if low == "*fp32" else few
            yield from _row_variants(dense_triton.gradients_kernel, types, shape, config.warps, ones)
    types = {"source": "*fp32", "bars": "*fp32", "targets": "*i64", "columns_out": "*i32", "values_out": "*fp32", "counts": "*i32"}
    constants = {"CAPACITY": dense_triton.GATE_CAPACITY, "BLOCK": dense_triton.GATE.block}
    for ones in ([], ["layers"]):
        yield from list(_row_variants(dense_triton.gate_kernel, types, constants, dense_triton.GATE.warps, ones))[1 if ones else 0 :]
