"""Merging adapters into the weights, and how far the rounding moves the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.lora import Lora, merge_lora


@dataclass(frozen=True)
class LogitShift:
    """How far something moves the logits, relative to their norm."""

    by_adapters: float
    by_rounding: float


@torch.no_grad()
def merge_rounded(
    backbone: Backbone, dtype: torch.dtype, histories: Sequence[Tensor]
) -> LogitShift | None:
    """Merge the adapters of a backbone in fp32, and round all weights to `dtype` once.

    The weights stay fp32 tensors. Returns what the adapters and the rounding do to the
    logits of the next token after each history (int64 [S]); None in fp32, where nothing
    is rounded away.
    """
    adapters = backbone.lora
    assert isinstance(adapters, Lora)
    if dtype == torch.float32:
        merge_lora(backbone)
        return None
    adapted = _logits(backbone, histories)
    adapters.detach()
    base = _logits(backbone, histories)
    merge_lora(backbone)
    backbone.write_trained_rows()
    for weight in backbone.gpt.parameters():
        weight.copy_(weight.to(dtype))
    if backbone.trained_rows is not None:
        backbone.trained_rows.read_from(backbone.vocabulary_tables)
    rounded = _logits(backbone, histories)
    norm = adapted.norm()
    return LogitShift(
        by_adapters=float((base - adapted).norm() / norm),
        by_rounding=float((rounded - adapted).norm() / norm),
    )


def _logits(backbone: Backbone, histories: Sequence[Tensor]) -> Tensor:
    """fp32 [n, V] after the last token of each history."""
    device = backbone.head_weight.device
    hidden = torch.cat([backbone.prefill(tokens[None].to(device))[0] for tokens in histories])
    return (hidden @ backbone.head_weight.t())[:, : backbone.vocab_size].float().cpu()
