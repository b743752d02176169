"""What of the model is trained, and the parameters that this makes on each rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ilrec_dist.model.config import LoraConfig, TargetModule, linear_shapes
from ilrec_dist.model.hf.slices import shard_slices
from ilrec_dist.plan.decoder import DecoderSizes, PlannedGroup, padded_each
from ilrec_dist.training.config import TrainConfig

# The optimizer's groups, in its order: decayed, not decayed, and rows of the vocabulary.
Group = Literal["matrix", "vector", "rows"]
GROUPS: tuple[Group, ...] = ("matrix", "vector", "rows")


@dataclass(frozen=True)
class TrainedParts:
    """All weights, or adapters and rows of added tokens beside frozen ones."""

    all_weights: bool = True
    lora: LoraConfig | None = None
    # The tokens [start, stop) whose rows of the vocabulary are parameters of their own.
    rows: tuple[int, int] | None = None

    def adapters(self, linear: Linear) -> int:
        """How many parts of a joint projection have adapters."""
        targets = () if self.lora is None else self.lora.target_modules
        return sum(module in targets for module in linear.modules)

    def needs(self, sizes: DecoderSizes, is_first: bool) -> LayerNeeds:
        """Which activations of the first layer, or of a later one, need a gradient."""
        has = {linear.name: self.adapters(linear) > 0 for linear in linears(sizes)}
        inputs = self.all_weights or self.rows is not None or not is_first
        joint = inputs or has["linear_qkv"]
        middle = joint or has["linear_proj"]
        return LayerNeeds(inputs, joint, middle, middle or has["linear_fc1"])

    def own_rows(self, sizes: DecoderSizes, tp: int) -> tuple[int, ...]:
        """The rows of a table on each rank that are parameters of their own.

        A rank that owns none of the tokens has one row that nothing reads.
        """
        if self.rows is None:
            return (0,) * tp
        (start, stop), shard = self.rows, sizes.vocab // tp
        edges = ((rank * shard, (rank + 1) * shard) for rank in range(tp))
        return tuple(max(1, min(stop, last) - max(start, first)) for first, last in edges)


ALL_WEIGHTS = TrainedParts()


def trained_parts(train: TrainConfig, added: tuple[int, int]) -> TrainedParts:
    """What a training trains; added: the range of the tokens that are added to a
    model's own.
    """
    kind = train.trainable
    is_full = kind == "full"
    apart = train.new_rows_learning_rate is not None if is_full else kind.endswith("new_rows")
    lora = train.lora if kind.startswith("lora") else None
    return TrainedParts(is_full, lora, added if apart else None)


@dataclass(frozen=True)
class LayerNeeds:
    """Whether a layer's activations need a gradient, in the forward pass's order."""

    inputs: bool
    # Queries, keys and values.
    joint: bool
    # The residual stream behind the attention.
    middle: bool
    # Gate and up.
    expanded: bool


@dataclass(frozen=True)
class Linear:
    """A linear map of a layer, of one part or of several that are joined."""

    name: str
    modules: tuple[TargetModule, ...]
    inputs: int
    # Of each part.
    outputs: tuple[int, ...]

    @property
    def is_row_parallel(self) -> bool:
        return self.name in ("linear_proj", "linear_fc2")


def linears(sizes: DecoderSizes) -> list[Linear]:
    """Those of a layer, in the order of the module's parameters."""
    gated: tuple[TargetModule, ...] = ("gate_proj", "up_proj") if sizes.gated else ("up_proj",)
    joined: dict[str, tuple[TargetModule, ...]] = {
        "linear_proj": ("o_proj",),
        "linear_qkv": ("q_proj", "k_proj", "v_proj"),
        "linear_fc1": gated,
        "linear_fc2": ("down_proj",),
    }
    shapes = linear_shapes(sizes.config)
    return [
        Linear(name, parts, shapes[parts[0]][1], tuple(shapes[part][0] for part in parts))
        for name, parts in joined.items()
    ]


@dataclass(frozen=True)
class Parameter:
    """A parameter's elements in the whole model, and on each rank of a tp group."""

    part: str
    group: Group
    is_trained: bool
    total: int
    ranks: tuple[int, ...]


def parameters(sizes: DecoderSizes, trained: TrainedParts, tp: int) -> list[Parameter]:
    """All of the training's, in the order of the module's."""
    counted = [
        Parameter(
            part,
            "matrix" if dimensions >= 2 else "vector",
            trained.all_weights,
            size.total,
            (size.per_rank(tp),) * tp,
        )
        for part, dimensions, size in sizes.tensors()
    ]
    if trained.lora is not None:
        layer = [
            adapter
            for linear in linears(sizes)
            for adapter in _adapters(linear, sizes, trained, tp)
        ]
        counted += layer * sizes.layers
    if trained.rows is not None:
        start, stop = trained.rows
        ranks = tuple(count * sizes.hidden for count in trained.own_rows(sizes, tp))
        tables = 1 if sizes.config.tie_embeddings else 2
        rows = Parameter("added rows", "rows", True, (stop - start) * sizes.hidden, ranks)
        counted += [rows] * tables
    return counted


def _adapters(
    linear: Linear, sizes: DecoderSizes, trained: TrainedParts, tp: int
) -> list[Parameter]:
    """The factors A of a map's adapters, and then their factors B."""
    lora = trained.lora
    assert lora is not None
    parts = [part for part, name in enumerate(linear.modules) if name in lora.target_modules]
    a = lora.rank * linear.inputs
    factors = [
        Parameter("adapters", "matrix", True, a, (a // tp if linear.is_row_parallel else a,) * tp)
        for _ in parts
    ]
    for part in parts:
        b = linear.outputs[part] * lora.rank
        ranks = (b,) * tp
        if not linear.is_row_parallel:
            ranks = tuple(lora.rank * rows for rows in _rows_of_ranks(linear, part, sizes, tp))
        factors.append(Parameter("adapters", "matrix", True, b, ranks))
    return factors


def _rows_of_ranks(linear: Linear, part: int, sizes: DecoderSizes, tp: int) -> list[int]:
    """Output features of a part of a column-parallel map on each rank."""
    full = [sum(linear.outputs), linear.inputs]
    return [
        sum(
            piece.stop - piece.start
            for piece in shard_slices(f"{linear.name}.weight", full, sizes.config, rank, tp)
            if piece.tensor == part
        )
        for rank in range(tp)
    ]


def fullest_rank(parameters: Sequence[Parameter], tp: int) -> int:
    """The rank of a tp group that trains most."""
    return max(
        range(tp),
        key=lambda rank: sum(
            parameter.ranks[rank] for parameter in parameters if parameter.is_trained
        ),
    )


def planned_groups(
    parameters: Iterable[Parameter], rank: int, dp: int, zero_stage: int
) -> list[PlannedGroup]:
    """How DeepSpeed lays out the parameters that a rank of a tp group trains."""
    by_group: dict[Group, list[int]] = {group: [] for group in GROUPS}
    for parameter in parameters:
        if parameter.is_trained:
            by_group[parameter.group].append(parameter.ranks[rank])
    cuts_each = zero_stage == 3
    return [PlannedGroup(tuple(sizes), dp, cuts_each) for sizes in by_group.values() if sizes]


@dataclass(frozen=True)
class RankWeights:
    """Elements of each weight of a rank of a tp group, trained or frozen."""

    all: tuple[int, ...]
    layer: tuple[int, ...]
    layers: int

    @classmethod
    def of(
        cls, sizes: DecoderSizes, parameters: Iterable[Parameter], rank: int, tp: int
    ) -> RankWeights:
        layer = tuple(count.per_rank(tp) for _, _, count in sizes.layer())
        return cls(tuple(parameter.ranks[rank] for parameter in parameters), layer, sizes.layers)

    def padded_layer(self, dp: int) -> int:
        return padded_each(self.layer, dp)

    def padded_others(self, dp: int) -> int:
        """Of those outside of the layers."""
        return padded_each(self.all, dp) - self.layers * self.padded_layer(dp)
