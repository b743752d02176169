"""What the plan says of the steps that measured_step.py takes."""

from __future__ import annotations

from collections import Counter

from ilrec_dist.model.decoder import decoder_of
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.plan.activations import activation_bytes
from ilrec_dist.plan.communication import MicroBatch, StepLayout, step_collectives
from ilrec_dist.plan.decoder import DecoderSizes
from ilrec_dist.plan.memory import GATHERED, checkpoint_bytes, loss_bytes, state_bytes
from ilrec_dist.plan.plan import ELEMENT_BYTES
from ilrec_dist.plan.trained import RankWeights, fullest_rank, parameters, planned_groups
from ilrec_dist.testing.measured_step import MeasuredStep, StepSpec


def reckoned_step(spec: StepSpec, tp: int, dp: int, rows: int, entries: int) -> MeasuredStep:
    """What the plan says of the same step on the rank
    that trains most, and of the whole checkpoint.
    """
    train, trained = spec.train, spec.trained
    decoder = spec.backbone
    if spec.model is not None:
        decoder = decoder_of(decoder, read_config(spec.model))
    sizes = DecoderSizes.of(decoder, spec.vocab_size, spec.length)
    layout = StepLayout(
        tp,
        dp,
        train.accumulation_steps,
        ELEMENT_BYTES[train.precision],
        train.zero_stage,
        is_cuda=False,
        sequence_parallel=spec.sequence_parallel,
    )
    sequences = train.batch_size // (dp * train.accumulation_steps)
    packed = int(spec.lengths(sequences).sum()) if spec.packs else None
    batch = MicroBatch(sequences, spec.length, rows, entries, packed)
    counted = parameters(sizes, trained, tp)
    rank = fullest_rank(counted, tp)
    weights = RankWeights.of(sizes, counted, rank, tp)
    groups = planned_groups(counted, rank, dp, train.zero_stage)
    state = state_bytes(weights, groups, layout)
    # The measured ones hold what the loss keeps as well.
    of_loss = loss_bytes(sizes, spec.objective, batch, layout, trained, rank)
    kept_by_loss = sum(of_loss.values()) - of_loss["workspace"]
    kept = activation_bytes(sizes, batch, layout, trained, train.recompute) + kept_by_loss
    collectives: Counter[str] = Counter()
    for item in step_collectives(
        sizes, spec.objective, batch, layout, weights, groups, trained, train.recompute
    ):
        # The batches that are measured come with their rewards.
        if item.what != "rewards":
            collectives[item.operation] += item.bytes
    return MeasuredStep(
        weights=int(state["weights"]),
        gathered=int(state.get(GATHERED, 0)),
        gradients=int(state["gradients"]),
        master_weights=int(state["master weights"]),
        moments=int(state["moments"]),
        activations=int(kept),
        checkpoint=checkpoint_bytes(counted),
        collectives=collectives,
        rows=rows,
        entries=entries,
    )
