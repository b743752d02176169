"""Real training steps of a small model, measured:
what `ilrec plan` reckons for the same sizes.

`run_distributed(measure_step, world_size, tp, StepSpec(…))`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from ilrec_kernels import TokenLists
from torch import Tensor

from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.launch.device import quiet
from ilrec_dist.model.build import build_backbone, build_pretrained, load_pretrained
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import save_weights
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.lora import add_lora
from ilrec_dist.model.partial import separate_rows, train_partially
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import CrossLayerObjective
from ilrec_dist.plan.trained import (
    TrainedParts,
    trained_parts,
)
from ilrec_dist.testing.accounting import (
    counted_collectives,
    kept_by_recomputation,
    saved_for_backward,
    storage_bytes,
)
from ilrec_dist.testing.distributed import Mesh
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.engine import build_engine
from ilrec_dist.training.optimizer_state import flat_groups, take_part
from ilrec_dist.training.weight_ranges import cuts_weights, own_part
from ilrec_dist.training.whole_weights import forget_engine


@dataclass(frozen=True)
class StepSpec:
    backbone: BackboneConfig
    objective: ObjectiveConfig
    train: TrainConfig
    vocab_size: int
    # Items of each sequence before the generated one, and tokens of an item.
    items: int
    depth: int
    # The folder of a model with these sizes (`write_model`); None: a decoder from scratch.
    model: str | None = None
    # The last tokens of the vocabulary, which the model does not have.
    new_rows: int = 0
    # Whether sequences are of four lengths, and packed.
    packs: bool = False
    # Whether what lies between the tensor-parallel products is cut along the tokens.
    sequence_parallel: bool = False
    # Codes of each level, of which an item's tokens are one each and all a row's candidates. They
    # are the last tokens of the vocabulary. None: any tokens, and two candidates a row.
    codes: int | None = None
    # The model type that a drawn model passes for, whose optimizer has a fused step.
    family: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def length(self) -> int:
        return (self.items + 1) * self.depth - 1

    @property
    def added(self) -> tuple[int, int]:
        return self.vocab_size - self.new_rows, self.vocab_size

    def lengths(self, sequences: int) -> Tensor:
        """Tokens of each sequence, int64 [B]."""
        shorter = torch.arange(sequences) % 4 if self.packs else torch.zeros(sequences).long()
        return self.length - self.depth * shorter

    @property
    def first_item_token(self) -> int:
        return 1 if self.codes is None else self.vocab_size - self.depth * self.codes

    @property
    def trained(self) -> TrainedParts:
        return trained_parts(self.train, self.added)


@dataclass(frozen=True)
class MeasuredStep:
    """What one rank's step took; bytes of tensors, and of collectives by operation."""

    # Those that the rank keeps, and those that are whole for use under ZeRO 3.
    weights: int
    gathered: int
    gradients: int
    master_weights: int
    moments: int
    activations: int
    # Bytes of the rank's part of a checkpoint.
    checkpoint: int
    collectives: Counter[str]
    rows: int
    entries: int


def write_model(mesh: Mesh, spec: StepSpec, folder: str) -> None:
    """Write a model of random weights as a Hugging Face folder."""
    initialize_parallel(mesh.tp)
    size = spec.vocab_size - spec.new_rows
    save_weights(build_backbone(spec.backbone, size, spec.length, "fp32", 0), folder)
    destroy_parallel()


def measure_step(mesh: Mesh, spec: StepSpec) -> MeasuredStep:
    """Of the last of some steps: in the first the optimizer makes its state, and under
    ZeRO 3 DeepSpeed learns the order of the layers from two micro-batches.

    Where layers are recomputed, the first one also shows what that leaves.
    """
    training = SmallTraining(mesh, spec)
    backbone, engine = training.objective.backbone, training.engine
    optimizer, weights = engine.optimizer, list(backbone.parameters())
    activations, gradients, gathered = 0, [0], [0]
    is_cut = cuts_weights(engine)

    def look() -> None:
        gradients.append(_gradient_bytes(backbone, optimizer))

    # Before the gradients are summed over the ranks, and before the bucket goes.
    for name in ("reduce_gradients", "_release_ipg_buffers"):
        _call_around(optimizer, name, before=look)
    if is_cut:
        _call_around(
            optimizer.parameter_offload.param_coordinator,
            "fetch_sub_module",
            after=lambda: gathered.append(_whole_bytes(engine, weights)),
        )
    for step in range(3 if is_cut else 2):
        watching = kept_by_recomputation() if step == 0 else nullcontext([0])
        with counted_collectives() as collectives, watching as recomputed:
            for _ in range(spec.train.accumulation_steps):
                with saved_for_backward(weights) as saved:
                    batch, output = training.forward()
                kept = storage_bytes(saved)
                saved.clear()
                engine.backward(output.loss)
                activations = max(activations, kept + max(recomputed, default=0))
                look()
                del output
                engine.step()
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    kept_weights = [own_part(weight) for weight in weights]
    masters = (group.master for group in flat_groups(optimizer))
    part = take_part(engine, training.objective, training.parallel)
    measured = MeasuredStep(
        weights=storage_bytes(kept_weights),
        gathered=max(gathered),
        gradients=max(gradients),
        # In fp32 they are the weights.
        master_weights=storage_bytes([*kept_weights, *masters]) - storage_bytes(kept_weights),
        moments=storage_bytes(v for v in states if torch.is_tensor(v) and v.dim() > 0),
        activations=activations,
        checkpoint=sum(tensor.numel() * tensor.element_size() for tensor in part.tensors.values()),
        collectives=collectives,
        rows=len(batch[1]),
        entries=len(batch[4]),
    )
    training.close()
    return measured


def _nothing() -> None:
    pass


def _call_around(
    owner: Any,
    name: str,
    before: Callable[[], None] = _nothing,
    after: Callable[[], None] = _nothing,
) -> None:
    """Let a call of the method, where there is one, begin and end with others."""
    original = getattr(owner, name, None)
    if original is None:
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        answer = original(*args, **kwargs)
        after()
        return answer

    setattr(owner, name, call)


def _whole_bytes(engine: Any, weights: Sequence[Tensor]) -> int:
    """Weights that are whole, and buffers of those that are on their way."""
    on_their_way: list[Tensor] = []
    for several in engine.module.ds_inflight_param_registry.values():
        for handle in getattr(several, "handles", [several]):
            on_their_way += getattr(handle, "partitions", [])
    return storage_bytes([*weights, *on_their_way])


class SmallTraining:
    """A training of drawn sequences in this process, step by step."""

    def __init__(self, mesh: Mesh, spec: StepSpec) -> None:
        quiet()
        self.spec, self.parallel = spec, initialize_parallel(mesh.tp, spec.device)
        train, vocab = spec.train, spec.vocab_size
        self.objective = CrossLayerObjective(
            _backbone(spec),
            spec.objective,
            spec.backbone.num_layers,
            vocab,
            np.arange(spec.first_item_token, vocab, dtype=np.int32),
            self.parallel,
        ).to(self.parallel.device)
        self.engine = build_engine(self.objective, train, self.parallel)
        self.objective.train()
        sequences = train.batch_size // (self.parallel.dp * train.accumulation_steps)
        self.batches = _batches(spec, sequences)

    def forward(self) -> tuple[tuple[Tensor, ...], Any]:
        """The next micro-batch, and what its forward pass gives."""
        *batch, rewards = next(self.batches)
        scale = self.parallel.dp * self.spec.train.accumulation_steps / len(batch[1])
        return tuple(batch), self.engine(*batch, rewards=rewards, loss_scale=scale)

    def loss_alone(self) -> Callable[[], None]:
        """A call that runs the loss operator of a step, forward
        and backward, on hidden rows that were computed before.
        """
        objective = self.objective
        tokens, rows, targets, indptr, candidates, rewards = next(self.batches)
        with torch.no_grad():
            hidden = objective.backbone(tokens, rows, objective.num_intermediate)
        streams = tuple(h.detach().requires_grad_() for h in (hidden.final, *hidden.layers))
        lists, backbone = TokenLists(indptr, candidates), objective.backbone
        head = backbone.head_weight
        if backbone.trained_head_rows is not None:
            head = backbone.trained_head_rows
        leaves = [*streams, *([head] if head.requires_grad else [])]

        def run() -> None:
            options, scale = objective.options, 1 / len(rows)
            output = objective._loss(streams, targets, lists, rewards, options, scale)
            # The engine's hooks on the parameters stay out of it.
            torch.autograd.grad(output.loss, leaves)

        return run

    def step(self) -> None:
        """One optimizer step."""
        for _ in range(self.spec.train.accumulation_steps):
            _, output = self.forward()
            self.engine.backward(output.loss)
            self.engine.step()

    def close(self) -> None:
        self.engine.destroy()
        forget_engine(self.engine)
        destroy_parallel()


def _backbone(spec: StepSpec) -> Backbone:
    """As `pipeline.backbones` builds it."""
    train, vocab = spec.train, spec.vocab_size
    if spec.model is None:
        backbone = build_backbone(spec.backbone, vocab, spec.length, train.precision, 0)
        backbone.checkpoint_family = spec.family
        if train.trainable != "full":
            _train_adapters(backbone, spec)
    else:
        pretrained, longest = read_config(spec.model), spec.length
        backbone = build_pretrained(spec.backbone, pretrained, vocab, longest, train.precision, 0)
        load_pretrained(backbone, spec.model, NewRows(*spec.added))
        if train.trainable != "full":
            train_partially(backbone, train.trainable, train.lora, spec.model, spec.added, 0)
        elif train.new_rows_learning_rate is not None:
            separate_rows(backbone, spec.added)
    backbone.recompute, backbone.packs = train.recompute, spec.packs
    backbone.sequence_parallel = spec.sequence_parallel
    return backbone


def _train_adapters(backbone: Backbone, spec: StepSpec) -> None:
    """As `train_partially`, of a model that is in no folder."""
    backbone.base_sha256, backbone.added_rows = "drawn", spec.added
    if spec.trained.lora is not None:
        add_lora(backbone, spec.trained.lora)
    backbone.gpt.requires_grad_(False)
    if spec.trained.rows is not None:
        separate_rows(backbone, spec.added)


def _batches(spec: StepSpec, sequences: int) -> Iterator[tuple[Any, ...]]:
    """(tokens, rows, targets, indptr, candidates,
    rewards) without end: all items are targets.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(1, spec.vocab_size, shape, generator=generator)

    while True:
        position = torch.arange(spec.length)
        inside = (position >= spec.depth - 1) & (position < spec.lengths(sequences)[:, None])
        rows = inside.flatten().nonzero().flatten()
        if spec.codes is None:
            targets = tokens(len(rows))
            other = torch.where(targets == 1, 2, 1)
            lists = torch.stack([targets, other], 1).sort(1).values
        else:
            # The token after a position is of the next level.
            first = spec.first_item_token + (rows % spec.length + 1) % spec.depth * spec.codes
            targets = first + torch.randint(spec.codes, first.shape, generator=generator)
            lists = first[:, None] + torch.arange(spec.codes)
        indptr = torch.arange(len(rows) + 1) * lists.shape[1]
        candidates, rewards = lists.flatten(), None
        if spec.objective.crr_lambda > 0:
            rewards = torch.rand(len(candidates), generator=generator)
        batch = (tokens(sequences, spec.length), rows, targets, indptr, candidates, rewards)
        yield tuple(None if tensor is None else tensor.to(spec.device) for tensor in batch)


def _gradient_bytes(backbone: torch.nn.Module, optimizer: Any) -> int:
    """Gradients of the parameters, and what
    DeepSpeed keeps of them, its bucket left out.
    """
    buckets = set()
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buffers = [bucket.buffer] if torch.is_tensor(bucket.buffer) else bucket.buffer
        buckets |= {buffer.untyped_storage().data_ptr() for buffer in buffers}
    tensors: list[Tensor | None] = [p.grad for p in backbone.parameters()]
    tensors += getattr(optimizer, "fp32_groups_gradients_flat", [])
    tensors.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    for name in ("averaged_gradients", "all_grad_tensors"):
        groups: Mapping[int, Any] = getattr(optimizer, name, {})
        for value in groups.values():
            tensors += value if isinstance(value, list | tuple) else [value]
    return storage_bytes(
        tensor
        for tensor in tensors
        if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in buckets
    )
