"""Real training steps of a small model, measured:
what `ilrec plan` reckons for the same sizes.

`run_distributed(measure_step, world_size, tp, StepSpec(…))`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.launch.device import quiet
from ilrec_dist.model.build import build_backbone
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.plan.communication import MicroBatch, StepLayout, step_collectives
from ilrec_dist.plan.decoder import DecoderSizes
from ilrec_dist.plan.decoder import flat_groups as laid_out
from ilrec_dist.plan.memory import activation_bytes, loss_bytes, state_bytes
from ilrec_dist.plan.plan import ELEMENT_BYTES
from ilrec_dist.testing.accounting import counted_collectives, saved_for_backward, storage_bytes
from ilrec_dist.testing.distributed import Mesh
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import build_engine
from ilrec_dist.training.optimizer_state import flat_groups

CANDIDATES = 2


@dataclass(frozen=True)
class StepSpec:
    backbone: BackboneConfig
    objective: ObjectiveConfig
    train: TrainConfig
    vocab_size: int
    # Items of each sequence before the generated one, and tokens of an item.
    items: int
    depth: int

    @property
    def length(self) -> int:
        return (self.items + 1) * self.depth - 1


@dataclass(frozen=True)
class MeasuredStep:
    """What one rank's step took; bytes of tensors, and of collectives by operation."""

    weights: int
    gradients: int
    master_weights: int
    moments: int
    activations: int
    collectives: Counter[str]
    rows: int
    entries: int


def measure_step(mesh: Mesh, spec: StepSpec) -> MeasuredStep:
    """The second of two steps: in the first the optimizer makes its state."""
    training = SmallTraining(mesh, spec)
    backbone, engine = training.objective.backbone, training.engine
    activations = gradients = 0
    for _ in range(2):
        with counted_collectives() as collectives:
            for _ in range(spec.train.accumulation_steps):
                with saved_for_backward() as saved:
                    batch, output = training.forward()
                activations = storage_bytes(saved)
                saved.clear()
                engine.backward(output.loss)
                gradients = max(gradients, _gradient_bytes(backbone, engine.optimizer))
                del output
                engine.step()
    optimizer = engine.optimizer
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    weights = list(backbone.parameters())
    masters = (group.master for group in flat_groups(optimizer))
    measured = MeasuredStep(
        weights=storage_bytes(weights),
        gradients=gradients,
        # In fp32 they are the weights.
        master_weights=storage_bytes([*weights, *masters]) - storage_bytes(weights),
        moments=storage_bytes(v for v in states if torch.is_tensor(v) and v.dim() > 0),
        activations=activations,
        collectives=collectives,
        rows=len(batch[1]),
        entries=len(batch[4]),
    )
    training.close()
    return measured


class SmallTraining:
    """A training of drawn sequences in this process, step by step."""

    def __init__(self, mesh: Mesh, spec: StepSpec) -> None:
        quiet()
        self.spec, self.parallel = spec, initialize_parallel(mesh.tp)
        train, vocab = spec.train, spec.vocab_size
        self.objective = CrossLayerObjective(
            build_backbone(spec.backbone, vocab, spec.length, train.precision, 0),
            spec.objective,
            spec.backbone.num_layers,
            vocab,
            np.arange(1, vocab, dtype=np.int32),
            self.parallel,
        )
        self.engine = build_engine(self.objective, train, self.parallel)
        self.objective.train()
        sequences = train.batch_size // (self.parallel.dp * train.accumulation_steps)
        self.batches = _batches(spec, sequences)

    def forward(self) -> tuple[tuple[Tensor, ...], Any]:
        """The next micro-batch, and what its forward pass gives."""
        *batch, rewards = next(self.batches)
        scale = self.parallel.dp * self.spec.train.accumulation_steps / len(batch[1])
        return tuple(batch), self.engine(*batch, rewards=rewards, loss_scale=scale)

    def step(self) -> None:
        """One optimizer step."""
        for _ in range(self.spec.train.accumulation_steps):
            _, output = self.forward()
            self.engine.backward(output.loss)
            self.engine.step()

    def close(self) -> None:
        self.engine.destroy()
        destroy_parallel()


def _batches(spec: StepSpec, sequences: int) -> Iterator[tuple[Any, ...]]:
    """(tokens, rows, targets, indptr, candidates,
    rewards) without end: all items are targets.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(1, spec.vocab_size, shape, generator=generator)

    while True:
        first = torch.arange(sequences)[:, None] * spec.length
        rows = (first + torch.arange(spec.depth - 1, spec.length)).flatten()
        targets = tokens(len(rows))
        other = torch.where(targets == 1, 2, 1)
        candidates = torch.stack([targets, other], 1).sort(1).values.flatten()
        indptr = torch.arange(0, CANDIDATES * len(rows) + 1, CANDIDATES)
        rewards = None
        if spec.objective.crr_lambda > 0:
            rewards = torch.rand(len(candidates), generator=generator)
        yield tokens(sequences, spec.length), rows, targets, indptr, candidates, rewards


def _gradient_bytes(backbone: torch.nn.Module, optimizer: Any) -> int:
    """Gradients of the parameters, and what
    DeepSpeed keeps of them, its bucket left out.
    """
    buckets = {
        buffer.untyped_storage().data_ptr()
        for bucket in getattr(optimizer, "ipg_buckets", {}).values()
        for buffer in bucket.buffer
    }
    averaged: Mapping[int, Any] = getattr(optimizer, "averaged_gradients", {})
    tensors: list[Tensor | None] = [p.grad for p in backbone.parameters()]
    tensors += getattr(optimizer, "fp32_groups_gradients_flat", [])
    for value in averaged.values():
        tensors += value if isinstance(value, list | tuple) else [value]
    return storage_bytes(
        tensor
        for tensor in tensors
        if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in buckets
    )


def reckoned_step(spec: StepSpec, tp: int, dp: int, rows: int, entries: int) -> MeasuredStep:
    """What the plan says of the same step."""
    train = spec.train
    sizes = DecoderSizes.of(spec.backbone, spec.vocab_size, spec.length)
    element = ELEMENT_BYTES[train.precision]
    layout = StepLayout(tp, dp, train.accumulation_steps, element, is_cuda=False)
    sequences = train.batch_size // (dp * train.accumulation_steps)
    batch = MicroBatch(sequences, spec.length, rows, entries)
    tensors = [(dimensions, count.per_rank(tp)) for _, dimensions, count in sizes.tensors()]
    groups = laid_out(tensors, dp)
    state = state_bytes(sum(size for _, size in tensors), groups, layout)
    # The measured ones hold what the loss keeps as well.
    kept_by_loss = sum(loss_bytes(sizes, spec.objective, batch, layout).values())
    kept_by_loss -= loss_bytes(sizes, spec.objective, batch, layout)["workspace"]
    collectives: Counter[str] = Counter()
    for item in step_collectives(sizes, spec.objective, batch, layout, groups):
        # The batches that are measured come with their rewards.
        if item.what != "rewards":
            collectives[item.operation] += item.bytes
    return MeasuredStep(
        weights=int(state["weights"]),
        gradients=int(state["gradients"]),
        master_weights=int(state["master weights"]),
        moments=int(state["moments"]),
        activations=int(activation_bytes(sizes, batch, layout) + kept_by_loss),
        collectives=collectives,
        rows=rows,
        entries=entries,
    )
