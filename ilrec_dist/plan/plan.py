"""The plan of a training on stated hardware.

Nothing here starts a process or reads weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.tree import Config, check_together
from ilrec_dist.objective.config import ObjectiveConfig, num_streams
from ilrec_dist.objective.registry import get_method
from ilrec_dist.plan.activations import activation_bytes
from ilrec_dist.plan.communication import (
    FP32,
    Collective,
    MicroBatch,
    StepLayout,
    step_collectives,
)
from ilrec_dist.plan.decoder import DecoderSizes, padded_each
from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.host import host_bytes
from ilrec_dist.plan.memory import (
    CUT_BUCKET_GRADIENTS,
    FRAGMENTS,
    GATHERED,
    GRADIENTS,
    RESERVED,
    BeamBatch,
    bucket_bytes,
    checkpoint_bytes,
    decoding_bytes,
    flat_index_bytes,
    loss_bytes,
    state_bytes,
    weights_files,
)
from ilrec_dist.plan.speed import StepTime, step_time
from ilrec_dist.plan.trained import (
    Parameter,
    RankWeights,
    TrainedParts,
    fullest_rank,
    parameters,
    planned_groups,
    trained_parts,
)
from ilrec_dist.plan.workload import (
    DataSizes,
    ItemTokens,
    added_token_range,
    data_sizes,
    decoder_sizes,
    item_tokens,
    micro_batches,
)

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
# The data-parallel ranks agree on how many micro-batches a step has by an int64 number.
COUNT_BYTES = 8
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Plan:
    config: Config
    hardware: Hardware
    method: str
    data: DataSizes
    tokens: ItemTokens
    sizes: DecoderSizes
    # The range of the item tokens that follow a model's own.
    added: tuple[int, int]
    parameters: list[Parameter]
    trained: TrainedParts
    layout: StepLayout
    # The largest micro-batch of a rank, and one of average size.
    batch: MicroBatch
    mean_batch: MicroBatch
    # Bytes of one GPU by part, while it trains and while it validates.
    training: dict[str, float]
    validation: dict[str, float]
    # As `training`, with the other value of train.recompute, or of launch.sequence_parallel, which
    # is None without tensor parallelism.
    other_recompute: dict[str, float]
    other_sequence_parallel: dict[str, float] | None
    collectives: list[Collective]
    time: StepTime
    # Bytes of one node's host by part; None where the data's size is not known.
    host: dict[str, float] | None
    # Bytes of one checkpoint on disk, and of the best or the final weights.
    checkpoint: int
    weights: int

    @property
    def needed(self) -> float:
        """Bytes of one GPU at the fullest moment."""
        return max(sum(self.training.values()), sum(self.validation.values()))

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.gpu_memory

    @property
    def tokens_per_step(self) -> int:
        return self.mean_batch.tokens * self.layout.accumulation_steps * self.layout.dp

    @property
    def checkpoint_seconds(self) -> float:
        """It is written once and read once for its hashes."""
        return 2 * self.checkpoint / self.hardware.disk


def make_plan(config: Config, hardware: Hardware, stated: DataSizes) -> Plan:
    """The plan of the configured method that asks for most.

    launch.workers is taken to be one for each GPU. Raises UserError where the sizes
    are not known, and where the configuration is impossible on this hardware.
    """
    data = data_sizes(config, stated)
    return plan_for(config, hardware, data, item_tokens(config, data))


def plan_for(config: Config, hardware: Hardware, data: DataSizes, tokens: ItemTokens) -> Plan:
    """As `make_plan`, for data and items that are known already."""
    config = _on(config, hardware)
    sizes, added = decoder_sizes(config, tokens), added_token_range(config, tokens)
    return _plan(config, hardware, data, tokens, sizes, added)


def plan_again(plan: Plan, config: Config, hardware: Hardware) -> Plan:
    """As `make_plan`, for the same data and model in
    another layout; reads no tokenizer again.
    """
    config = _on(config, hardware)
    return _plan(config, hardware, plan.data, plan.tokens, plan.sizes, plan.added)


def _plan(
    config: Config,
    hardware: Hardware,
    data: DataSizes,
    tokens: ItemTokens,
    sizes: DecoderSizes,
    added: tuple[int, int],
) -> Plan:
    trained = trained_parts(config.train, added)
    counted = parameters(sizes, trained, config.launch.tp)
    batch, mean_batch, steps = micro_batches(config, tokens, data)
    layout = StepLayout(
        config.launch.tp,
        config.launch.dp,
        steps,
        ELEMENT_BYTES[config.train.precision],
        config.train.zero_stage,
        sequence_parallel=config.launch.sequence_parallel,
    )
    method, objective = _heaviest(config, sizes)
    rank = fullest_rank(counted, layout.tp)
    weights = RankWeights.of(sizes, counted, rank, layout.tp)
    groups = planned_groups(counted, rank, layout.dp, layout.zero_stage)
    trainable = sum(group.padded for group in groups)
    recompute = config.train.recompute
    collectives = step_collectives(
        sizes, objective, mean_batch, layout, weights, groups, trained, recompute
    )
    if config.train.micro_batch_tokens is not None and layout.dp > 1:
        what = "number of micro-batches"
        collectives.append(Collective("dp", what, "all_reduce", layout.dp, COUNT_BYTES))
    state = state_bytes(weights, groups, layout)
    kept = dict(state)
    if layout.cuts_weights:
        # All are gathered for it, and the bucket stays.
        kept[GATHERED] = float(layout.element * padded_each(weights.all, layout.dp))
        kept["gradient bucket"] = float(FP32 * CUT_BUCKET_GRADIENTS)
    elif not layout.keeps_gradients:
        del kept[GRADIENTS]
    loss = loss_bytes(sizes, objective, batch, layout, trained, rank)
    needs_rewards = get_method(method).needs_rewards(config.objective)
    rewards = flat_index_bytes(config.cf, data.items) if needs_rewards else {}
    stored, largest_file = weights_files(sizes, layout, trained, added[1] - added[0])
    decoding = BeamBatch(
        config.evaluation.batch_size,
        config.evaluation.beam,
        batch.tokens_per_sequence,
        tokens.depth,
    )
    other_layout = replace(layout, sequence_parallel=not layout.sequence_parallel)
    training, other_recompute, other_sequence_parallel = (
        _with_reserve(
            {
                **state,
                "gradient bucket": bucket_bytes(groups, layout),
                ACTIVATIONS: activation_bytes(sizes, batch, kept_layout, trained, recomputes),
                **{f"loss: {name}": size for name, size in loss.items()},
                **rewards,
            }
        )
        for kept_layout, recomputes in (
            (layout, recompute),
            (layout, not recompute),
            (other_layout, recompute),
        )
    )
    return Plan(
        config=config,
        hardware=hardware,
        method=method,
        data=data,
        tokens=tokens,
        sizes=sizes,
        added=added,
        parameters=counted,
        trained=trained,
        layout=layout,
        batch=batch,
        mean_batch=mean_batch,
        training=training,
        other_recompute=other_recompute,
        other_sequence_parallel=other_sequence_parallel if layout.tp > 1 else None,
        validation=_with_reserve({**kept, **decoding_bytes(sizes, decoding, layout), **rewards}),
        collectives=collectives,
        time=step_time(
            sizes,
            mean_batch,
            layout,
            hardware,
            collectives,
            trainable,
            num_streams(objective, sizes.layers),
            trained,
            recompute,
        ),
        host=host_bytes(
            data,
            tokens,
            config.cf,
            largest_file,
            checkpoint_bytes(counted) // layout.tp // layout.dp,
            hardware.nodes,
            hardware.gpus_per_node,
            layout.tp,
            needs_rewards,
            trained.all_weights,
            config.data.both_directions,
        ),
        checkpoint=checkpoint_bytes(counted),
        weights=stored,
    )


def _on(config: Config, hardware: Hardware) -> Config:
    """The configuration with a worker for each
    GPU. Raises UserError where it is impossible.
    """
    config = replace(config, launch=replace(config.launch, workers=hardware.gpus))
    check_together(config, f"{hardware.nodes} × {hardware.gpus_per_node} GPUs")
    if hardware.gpus_per_node % config.launch.tp:
        raise UserError(
            f"launch.tp {config.launch.tp}: a tensor-parallel group lies on one node, and tp does "
            f"not divide --gpus-per-node {hardware.gpus_per_node}; choose a tp that does"
        )
    return config


def _heaviest(config: Config, sizes: DecoderSizes) -> tuple[str, ObjectiveConfig]:
    """The method whose loss has the most streams, and its objective."""

    def streams(name: str) -> int:
        return num_streams(get_method(name).objective(config.objective), sizes.layers)

    method = max(config.train.methods, key=streams)
    return method, get_method(method).objective(config.objective)


def _with_reserve(parts: dict[str, float]) -> dict[str, float]:
    """With what CUDA, NCCL and the allocator's fragments take."""
    return {
        **parts,
        "fragments": FRAGMENTS * sum(parts.values()),
        "CUDA and NCCL": float(RESERVED),
    }
