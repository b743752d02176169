"""Every form in which the kernels are launched, for compiling them without a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ilrec_kernels.triton.candidate_buffer import BUFFER_SIZE
from ilrec_kernels.triton.kernels import (
    BLOCK,
    BLOCK_PART,
    LAUNCH_OPTIONS,
    MAX_K,
    MAX_LAYERS,
    gradients_kernel,
    statistics_kernel,
)

# Integer and real arguments that are not specialised, or are no multiple of 16.
UNALIGNED = ("low", "high", "first", "last", "m", "k", "share")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    signature   the arguments' types by name, constants as "constexpr"
    attributes  arguments that are multiples of 16, as Triton finds out at launch
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    attributes: dict[tuple[int], list[list[Any]]]


def variants() -> Iterator[Variant]:
    """Yield all of them: every combination of terms, candidates and gradient dtype."""
    for softmax, distill in ((True, False), (True, True), (False, True)):
        terms = {"SOFTMAX": softmax, "DISTILL": distill}
        for candidates, exclude in itertools.product(("", "layers", "final"), (False, True)):
            # Candidates that the kernel collects need no marks.
            if not exclude or (softmax and not candidates):
                constants = {**terms, "EXCLUDE": exclude, "CANDIDATES": candidates}
                yield from _statistics_variants(constants)
        for dtype, buffered in itertools.product(("*fp32", "*bf16"), (False, True)):
            if softmax or not buffered:
                yield from _gradients_variants({**terms, "BUFFERED": buffered}, dtype)


def _statistics_variants(constants: dict[str, Any]) -> Iterator[Variant]:
    types = dict.fromkeys(
        ("final", "layers", "out", "thresholds", "kth_values", "buffer_values"), "*fp32"
    )
    types |= dict.fromkeys(("values_out", "logits_out"), "*fp32") | {"share": "fp32"}
    types |= {"buffer_columns": "*i32", "columns_out": "*i32", "passed_out": "*i32"}
    types |= {"targets": "*i64", "excluded": "*i8" if constants["EXCLUDE"] else "*fp32"}
    if not constants["CANDIDATES"]:
        # A launch then passes the logits in their place.
        absent = ("targets", "buffer_columns", "columns_out", "passed_out")
        types |= dict.fromkeys(absent, "*fp32")
    sizes = {"LAYERS": MAX_LAYERS, "BUFFER": BUFFER_SIZE, "BLOCK": BLOCK, "PART": BLOCK_PART}
    yield from _row_variants(statistics_kernel, types, constants | sizes)


def _gradients_variants(constants: dict[str, Any], dtype: str) -> Iterator[Variant]:
    types = dict.fromkeys(("final", "layers", "factors"), "*fp32")
    types |= {"final_out": dtype, "layers_out": dtype, "targets": "*i64"}
    if constants["BUFFERED"]:
        types |= {"buffer_columns": "*i32", "buffer_gradients": "*fp32"}
    else:
        # A launch then passes the targets in their place.
        types |= {"buffer_columns": "*i64", "buffer_gradients": "*i64"}
    sizes = {"MAX_K": MAX_K, "BLOCK": BLOCK}
    yield from _row_variants(gradients_kernel, types, constants | sizes)


def _row_variants(
    kernel: Any, types: dict[str, str], constants: dict[str, Any]
) -> Iterator[Variant]:
    """Yield a row kernel as Triton specialises it at launch.

    These are: for sizes of which nothing is known; for a
    vocabulary that is a multiple of 16, with pointers and strides
    that are as well; and this with strides beyond 2³¹ elements.
    """
    names = [name for name in kernel.arg_names if name not in constants]
    aligned = [name for name in names if name not in UNALIGNED]
    yield _variant(kernel, types, constants)
    yield _variant(kernel, types, constants, aligned)
    if constants["DISTILL"]:
        large = {name: "i64" for name in names if name.startswith("stride_layer")}
        yield _variant(kernel, types | large, constants, aligned)


def _variant(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: Iterable[str] = ()
) -> Variant:
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    name = kernel.__name__ + "".join(f" {k}={v}" for k, v in constants.items())
    name += " aligned" * bool(attributes) + " large" * (types.get("stride_layer") == "i64")
    return Variant(name, kernel, signature, constants, LAUNCH_OPTIONS, attributes)
