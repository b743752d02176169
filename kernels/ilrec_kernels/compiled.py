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
    attributes: dict[
        tuple[int], list[list[Any]]
    ]  # arguments that are multiples of 16, as Triton finds out at launch


def _variant(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: Iterable[str] = ()
) -> Variant:
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    name = kernel.__name__ + "".join(f" {k}={v}" for k, v in constants.items())
    attributes = {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument in aligned
        if argument not in constants
    }
    name += " aligned" * bool(attributes) + " large" * (types.get("stride_layer") == "i64")
    return Variant(name, kernel, signature, constants, dense_triton.LAUNCH, attributes)


def _row_variants(
    kernel: Any, types: dict[str, str], constants: dict[str, Any]
) -> Iterator[Variant]:
    """A row kernel as Triton specialises it at launch: for sizes of which nothing is known; for a vocabulary that is a multiple of 16, with
    pointers and strides that are as well; and this with strides beyond 2³¹ elements."""
    yield _variant(kernel, types, constants)
    aligned = [name for name in kernel.arg_names if name not in constants and name not in LOOSE]
    yield _variant(kernel, types, constants, aligned)
    if constants["DISTILL"]:
        yield _variant(
            kernel,
            types | {name: "i64" for name in kernel.arg_names if name.startswith("stride_layer")},
            constants,
            aligned,
        )


LOOSE = (
    "low",
    "high",
    "first",
    "last",
    "m",
    "k",
    "share",
)  # numbers that are not specialised, or no multiple of 16


def variants() -> Iterator[Variant]:
    """All of them: each combination of terms, each source of candidates, each dtype the gradients are stored in."""
    single = dict.fromkeys(
        ("final", "layers", "out", "bars", "floors", "list_values", "values_out", "logits_out"),
        "*fp32",
    )
    single |= {
        "list_columns": "*i32",
        "columns_out": "*i32",
        "found_out": "*i32",
        "targets": "*i64",
        "share": "fp32",
    }
    absent = dict.fromkeys(
        (
            "bars",
            "floors",
            "targets",
            "list_columns",
            "list_values",
            "columns_out",
            "values_out",
            "logits_out",
            "found_out",
        ),
        "*fp32",
    )
    sizes = {
        "LAYERS": dense_triton.LAYERS,
        "ROOM": dense_triton.ROOM,
        "BLOCK": dense_triton.BLOCK,
        "PART": dense_triton.PART,
    }
    for softmax, distill in ((True, False), (True, True), (False, True)):
        terms = {"SOFTMAX": softmax, "DISTILL": distill}
        for gate, exclude in itertools.product(("", "layers", "final"), (False, True)):
            if exclude and (gate or not softmax):
                continue
            types = {**single, **({} if gate else absent), "sent": "*i8" if exclude else "*fp32"}
            yield from _row_variants(
                dense_triton.statistics_kernel,
                types,
                {**terms, "EXCLUDE": exclude, "GATE": gate, **sizes},
            )
        for low, listed in itertools.product(
            ("*fp32", "*bf16"), (False, True) if softmax else (False,)
        ):
            types = dict.fromkeys(("final", "layers", "factors"), "*fp32") | {
                "final_out": low,
                "layers_out": low,
                "targets": "*i64",
            }
            types |= (
                {"listed": "*i32", "listed_gradients": "*fp32"}
                if listed
                else {"listed": "*i64", "listed_gradients": "*i64"}
            )
            constants = {
                **terms,
                "LISTED": listed,
                "WANTED": dense_triton.WANTED,
                "BLOCK": dense_triton.BLOCK,
            }
            yield from _row_variants(dense_triton.gradients_kernel, types, constants)
