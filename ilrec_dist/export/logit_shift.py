"""How far rounding moves a merged model's logits, computed a layer at a time.

One decoder layer in fp32 is held, and the residual stream of the sampled histories.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ilrec_dist.export.tensor_rows import MergedTensors
from ilrec_dist.model.elementwise import normed
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import CheckpointPlan
from ilrec_dist.model.hf.slices import shard_slices
from ilrec_dist.model.hf.tensor_files import row_blocks

LAYER = "decoder.layers.0."
EMBEDDING, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"
Rows = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class LogitShift:
    """How far something moves the logits, relative to their norm."""

    by_adapters: float
    by_rounding: float


@torch.no_grad()
def logit_shift(
    tensors: MergedTensors,
    plan: CheckpointPlan,
    backbone: Backbone,
    dtype: torch.dtype,
    histories: Sequence[Tensor],
    device: torch.device,
) -> LogitShift:
    """What the adapters, and the rounding of the merged weights to `dtype`, do to the
    logits of the next token after each history (int64 [S]).

    backbone: without values. plan: of the pretrained model.
    """

    def merged(key: str, start: int, stop: int) -> Tensor:
        return tensors.rows(key, start, stop).float()

    def base(key: str, start: int, stop: int) -> Tensor:
        return tensors.rows_without_adapters(key, start, stop).float()

    def rounded(key: str, start: int, stop: int) -> Tensor:
        return tensors.rows(key, start, stop).to(dtype).float()

    models = [
        _Streamed(rows, plan, backbone, histories, device) for rows in (merged, base, rounded)
    ]
    # One after the other, so that one layer is held.
    for model in models:
        model.run_layers()
    key = plan.parameters[HEAD if HEAD in plan.parameters else EMBEDDING][0][0]
    norm, by_adapters, by_rounding = torch.zeros(3, dtype=torch.float64)
    shape = tensors.shapes[key]
    for start, stop in row_blocks(shape, torch.float32.itemsize):
        logits, without, approximate = (model.logits(key, start, stop) for model in models)
        norm += logits.double().square().sum().cpu()
        by_adapters += (without - logits).double().square().sum().cpu()
        by_rounding += (approximate - logits).double().square().sum().cpu()
    return LogitShift(float((by_adapters / norm).sqrt()), float((by_rounding / norm).sqrt()))


class _Streamed:
    """A decoder whose layers are read one after the other."""

    def __init__(
        self,
        rows: Rows,
        plan: CheckpointPlan,
        backbone: Backbone,
        histories: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self.rows, self.plan, self.config = rows, plan, backbone.config
        self.device, self.positions = device, backbone.max_positions
        self.histories = histories
        self.ends = torch.empty(0)

    def run_layers(self) -> None:
        """Run the histories through all layers, and keep their last tokens, [n, d]."""
        tokens, places = torch.unique(torch.cat(list(self.histories)), return_inverse=True)
        config = dataclasses.replace(
            self.config, num_layers=1, vocab_multiple=1, tie_embeddings=True
        )
        # Of one layer, and of the tokens that occur.
        held = Backbone(config, len(tokens), self.positions, "fp32", initialize=False).eval()
        parameters = dict(held.gpt.named_parameters())
        self._fill_tokens(parameters[EMBEDDING], tokens)
        held.to(self.device)
        edges = torch.tensor([0, *(len(history) for history in self.histories)]).cumsum(0).tolist()
        batch = [places[None, start:stop].to(self.device) for start, stop in pairwise(edges)]
        streams = [held.embed(prefix, 0, prefix.shape[1]) for prefix in batch]
        (layer,) = held.gpt.decoder.layers
        for number in range(self.config.num_layers):
            for name, parameter in parameters.items():
                if name.startswith(LAYER):
                    self._fill(parameter, name.replace(LAYER, f"decoder.layers.{number}."))
            streams = [(layer(hidden, None, rotary), rotary) for hidden, rotary in streams]
        self._fill(parameters[NORM], NORM)
        ends = torch.cat([hidden[:, -1] for hidden, _ in streams])
        self.ends = normed(held.gpt.decoder.final_layernorm, ends)[0]

    def logits(self, key: str, start: int, stop: int) -> Tensor:
        """fp32 [n, stop - start] of these tokens, from the head's tensor `key`."""
        return self.ends @ self.rows(key, start, stop).to(self.device).t()

    def _fill_tokens(self, table: Tensor, tokens: Tensor) -> None:
        (key,), shape = self.plan.parameters[EMBEDDING]
        for start, stop in row_blocks([int(tokens[-1]) + 1, *shape[1:]], torch.float32.itemsize):
            here = (tokens >= start) & (tokens < stop)
            if here.any():
                table[here] = self.rows(key, start, stop)[tokens[here] - start]

    def _fill(self, parameter: Tensor, name: str) -> None:
        for target, key, start, stop in self._blocks(parameter, name):
            target.copy_(self.rows(key, start, stop))

    def _blocks(self, parameter: Tensor, name: str) -> Iterator[tuple[Tensor, str, int, int]]:
        """Blocks of rows of a parameter, and which rows of which tensor they are."""
        keys, full = self.plan.parameters[name]
        offset = 0
        for part in shard_slices(name, full, self.config, 0, 1):
            first, last = (part.start, part.stop) if part.dim == 0 else (0, full[0])
            for start, stop in row_blocks([last - first, *full[1:]], torch.float32.itemsize):
                target = parameter[offset + start : offset + stop]
                yield target, keys[part.tensor], first + start, first + stop
            offset += last - first
