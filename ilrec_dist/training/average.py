"""An exponential moving average of the weights: what is validated, kept and evaluated in place of the last step's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class WeightAverage:
    """a ← d·a + (1 − d)·w after every optimizer step, with d = min(decay, (1 + step) / (10 + step)): the first weights are soon forgotten.

    fp32, this rank's shards alone (the average of a shard is the shard of the average), on the weights' device. decay in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = dict(module.named_parameters())
        self.decay = decay
        self.values = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, from 1."""
        weights = [parameter.detach().float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.values.values()), weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the module has the averaged weights; after it its own, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in self.values.items()}, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, bit for bit."""
        for name, value in load_file(path).items():
            self.values[name].copy_(value)
