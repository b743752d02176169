"""Launches of the row kernels over a chunk's dense logits, or over a slice of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_kernels.triton.candidate_buffer import BUFFER_SIZE, CandidateBuffer, CandidateFilter
from ilrec_kernels.triton.kernels import (
    BLOCK,
    BLOCK_PART,
    LAUNCH_OPTIONS,
    MAX_K,
    MAX_LAYERS,
    gradients_kernel,
    statistics_kernel,
)


@dataclass(frozen=True)
class DenseRows:
    """fp32 logits of rows, as the kernels walk over them.

    layers    the intermediate layers' logits; m = 0 where the kernel does not read them
    distill   (first, last + 1) distill column of `final`
    shift     the layers' column of a token is its column of `final` − shift
    softmax   the cross-entropy covers the columns of `final`
    """

    final: Tensor  # [n, c]
    layers: Tensor  # [m, n, c']
    distill: tuple[int, int]
    shift: int
    softmax: bool

    @property
    def distilled_layers(self) -> int:
        return len(self.layers) if self.distill[1] > self.distill[0] else 0

    @property
    def matrix(self) -> Tensor:
        """What stands for the layers in a launch: without any, it is never read."""
        return self.layers if len(self.layers) else self.final[None]


@dataclass(frozen=True)
class RowParts:
    """A row's softmaxes over the columns of one launch, as in RankStats."""

    row_max: Tensor  # [n]
    sum_exp: Tensor  # [n]
    teacher_max: Tensor  # [n]
    teacher_sum: Tensor  # [n]
    layer_max: Tensor  # [m, n]
    layer_sum: Tensor  # [m, n]
    cross: Tensor  # [m, n]


@dataclass(frozen=True)
class BufferedGradients:
    """The candidates' columns (−1: none) and what their gradients are."""

    columns: Tensor  # int32 [n, k]
    values: Tensor  # fp32 [n, k]


def row_statistics(
    rows: DenseRows, excluded: Tensor | None, accept: CandidateFilter | None
) -> tuple[RowParts, CandidateBuffer | None]:
    """Compute all statistics, and collect the candidates that `accept` lets through.

    `excluded` int8 [n, c] marks what the normaliser
    leaves out; collected candidates are left out as well.
    """
    final, matrix, (n, c), m = rows.final, rows.matrix, rows.final.shape, len(rows.layers)
    if m > MAX_LAYERS:
        raise ValueError(
            f"layer_hidden: the triton backend takes at most {MAX_LAYERS} layers, got {m}"
        )
    out = final.new_empty(n, 4 + 3 * m)
    # Tensors that a specialisation does not read are replaced by any other.
    source, first, last, k, buffer = "", 0, 0, 0, None
    filter_tensors: tuple[Tensor, ...] = (final,) * 3
    buffer_tensors: tuple[Tensor, ...] = (final,) * 6
    if accept is not None:
        source = "final" if accept.from_final else "layers"
        first, last, k = accept.first, accept.last, accept.k
        columns = final.new_empty(n, k, dtype=torch.int32)
        ensemble, z = final.new_empty(n, k), final.new_empty(n, k)
        buffer = CandidateBuffer(columns, ensemble, z, columns.new_empty(n))
        filter_tensors = (accept.thresholds, accept.kth_values, accept.targets)
        work = columns.new_empty(n, BUFFER_SIZE), final.new_empty(n, BUFFER_SIZE)
        buffer_tensors = (*work, columns, ensemble, z, buffer.passed)
    if n:
        with torch.cuda.device(final.get_device()):
            statistics_kernel[(n,)](
                final,
                matrix,
                final if excluded is None else excluded,
                out,
                *filter_tensors,
                *buffer_tensors,
                c,
                *rows.distill,
                first,
                last,
                rows.shift,
                matrix.shape[-1],
                m,
                k,
                1 / max(m, 1),
                final.stride(0),
                matrix.stride(0),
                matrix.stride(1),
                SOFTMAX=rows.softmax,
                EXCLUDE=excluded is not None,
                DISTILL=rows.distilled_layers > 0,
                CANDIDATES=source,
                LAYERS=MAX_LAYERS,
                BUFFER=BUFFER_SIZE,
                BLOCK=BLOCK,
                PART=BLOCK_PART,
                **LAUNCH_OPTIONS,
            )
    of_final = out[:, :4].T.contiguous()
    of_layers = torch.unflatten(out[:, 4:], 1, (3, m)) if m else out.new_empty(n, 3, 0)
    of_layers = of_layers.permute(1, 2, 0).contiguous()
    return RowParts(*of_final.unbind(0), *of_layers.unbind(0)), buffer


def logits_to_gradients(
    rows: DenseRows,
    factors: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    buffered: BufferedGradients | None,
) -> tuple[Tensor, Tensor]:
    """Overwrite the logits with gradients, [n, c] and [m, n, c'] in `dtype`.

    They are views of the same memory, and rounded once. `factors` is
    sources.dense_triton.factor_table, `targets` the target's column or −1, int64 [n].
    """
    final, matrix, (n, c), m = rows.final, rows.matrix, rows.final.shape, rows.distilled_layers
    final_out, layers_out = final.view(dtype), matrix.view(dtype)
    columns, values, k = targets, targets, 0
    if buffered is not None:
        columns, values, k = buffered.columns, buffered.values, buffered.columns.shape[1]
    if n:
        with torch.cuda.device(final.get_device()):
            gradients_kernel[(n,)](
                final,
                matrix,
                final_out,
                layers_out,
                factors,
                targets,
                columns,
                values,
                c,
                *rows.distill,
                rows.shift,
                matrix.shape[-1],
                m,
                k,
                final.stride(0),
                matrix.stride(0),
                matrix.stride(1),
                final_out.stride(0),
                layers_out.stride(0),
                layers_out.stride(1),
                SOFTMAX=rows.softmax,
                DISTILL=m > 0,
                BUFFERED=buffered is not None,
                MAX_K=MAX_K,
                BLOCK=BLOCK,
                **LAUNCH_OPTIONS,
            )
    return final_out[:, :c], layers_out[: len(rows.layers), :, : matrix.shape[-1]]
