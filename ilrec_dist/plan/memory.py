"""Memory of one GPU by part, while it trains and while it validates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.model.sharding import ShardSpec
from ilrec_dist.model.weight_layout import StoredTensor, plan_files
from ilrec_dist.objective.config import ObjectiveConfig, num_streams
from ilrec_dist.plan.activations import norm_bytes
from ilrec_dist.plan.communication import FP32, MicroBatch, StepLayout
from ilrec_dist.plan.decoder import DecoderSizes, PlannedGroup, padded_each
from ilrec_dist.plan.host import keeps_index_on_gpu
from ilrec_dist.plan.trained import ALL_WEIGHTS, Parameter, RankWeights, TrainedParts, parameters

MIB = 1 << 20
# The loss's workspace on a GPU where objective.workspace_mib is null (ilrec_kernels.plan).
LOSS_WORKSPACE = 1024 * MIB
# DeepSpeed's reduce_bucket_size, in gradients; its buffer has this size whatever the model's is.
BUCKET_GRADIENTS = 500_000_000
# The same under ZeRO 3 (training.engine).
CUT_BUCKET_GRADIENTS = 50_000_000
GRADIENTS = "gradients"
GATHERED = "gathered weights"
# Adam's two moments, in fp32.
MOMENTS_BYTES = 8
# CUDA's context, cuBLAS and NCCL's channels of the tp and dp groups: about what an H100 shows.
RESERVED = 1536 * MIB
# The share of the rest that the allocator loses to fragments.
FRAGMENTS = 0.05
# Logits and candidates of a beam search in memory at once (inference.beam_search), fp32, and the
# copies that its softmax and top-k make of them.
BEAM_ELEMENTS, BEAM_COPIES = 1 << 27, 3
# FAISS's temporary memory on a GPU of more than 8 GiB, which it takes for each index.
INDEX_SCRATCH = 1536 * MIB


@dataclass(frozen=True)
class BeamBatch:
    """A batch of a validation's beam search."""

    users: int
    beams: int
    prefix: int
    depth: int


def state_bytes(
    weights: RankWeights, groups: Sequence[PlannedGroup], layout: StepLayout
) -> dict[str, float]:
    """Weights, gradients and optimizer state of a rank.

    groups: the parameters that it trains. The optimizer state is divided over the dp
    ranks. In bf16 under ZeRO 1 a rank keeps all gradients in bf16 and their sum in
    fp32. In fp32 under ZeRO 1 all are there before the first of them goes through
    DeepSpeed's bucket. ZeRO 2 sends each through the bucket when it is made, and keeps
    in bf16 the rank's range, in fp32 every parameter of which the range has a part, and
    those of the micro-batch at hand beside the others' sum. ZeRO 3 keeps a range of
    each weight and gradient, and gathers two layers at a time, and for a whole step the
    weights outside of layers.
    """
    trainable = sum(group.padded for group in groups)
    share = trainable / layout.dp
    touched = sum(group.touched() for group in groups)
    gradients: float
    if layout.cuts_weights:
        gradients = FP32 * share
    elif layout.keeps_gradients:
        gradients = (FP32 + layout.element) * trainable
    elif layout.zero_stage == 1:
        gradients = FP32 * max(trainable, trainable - BUCKET_GRADIENTS + touched)
    elif layout.element < FP32:
        gradients = FP32 * share
    else:
        gradients = FP32 * touched * min(2, layout.accumulation_steps)
    if layout.cuts_weights:
        whole = weights.padded_others(layout.dp)
        whole += min(2, weights.layers) * weights.padded_layer(layout.dp)
        kept = {
            "weights": layout.element * padded_each(weights.all, layout.dp) / layout.dp,
            GATHERED: float(layout.element * whole),
        }
    else:
        padding = trainable - sum(sum(group.sizes) for group in groups)
        kept = {"weights": float(layout.element * (sum(weights.all) + padding))}
    return {
        **kept,
        GRADIENTS: gradients,
        # In fp32 they are the weights themselves.
        "master weights": FP32 * share if layout.element < FP32 else 0.0,
        "moments": MOMENTS_BYTES * share,
    }


def bucket_bytes(groups: Sequence[PlannedGroup], layout: StepLayout) -> float:
    """What the gradients go through to be summed over the dp ranks.

    In bf16 under ZeRO 1 they are copied into a buffer as large as they need. Otherwise
    DeepSpeed allocates one whatever the model's size is, in the precision of the
    weights, and sums a copy of what is in it, which in bf16 there is in fp32 too. It
    allocates two where the sum goes on beside the backward pass. A lone rank in fp32
    has none (training.engine). ZeRO 3 has a smaller bucket, in fp32; a
    larger gradient than it goes by itself.
    """
    if layout.dp == 1 and layout.element == FP32:
        return 0.0
    if layout.cuts_weights:
        sizes = [size for group in groups for size in group.sizes]
        # A copy of what is in it, or of the largest gradient that is not.
        copied = max(min(sum(sizes), CUT_BUCKET_GRADIENTS), *sizes)
        return float(FP32 * (CUT_BUCKET_GRADIENTS + copied))
    filled = min(sum(group.padded for group in groups), BUCKET_GRADIENTS)
    if layout.keeps_gradients:
        return float(FP32 * filled)
    copies = layout.element + (FP32 if layout.element < FP32 else 0)
    buffers = 2 if layout.overlaps_reduction else 1
    return float(layout.element * BUCKET_GRADIENTS * buffers + copies * filled)


def loss_bytes(
    sizes: DecoderSizes,
    objective: ObjectiveConfig,
    batch: MicroBatch,
    layout: StepLayout,
    trained: TrainedParts = ALL_WEIGHTS,
    tp_rank: int = 0,
) -> dict[str, float]:
    """The loss's workspace, the gradient of a rank's trained
    rows of the head in fp32, and the hidden rows of all streams.
    """
    workspace = LOSS_WORKSPACE if objective.workspace_mib is None else objective.workspace_mib * MIB
    streams = num_streams(objective, sizes.layers)
    # What each stream's norm keeps, and the gradient of what comes out of it.
    row = norm_bytes(sizes, layout) + sizes.hidden * layout.element
    head_rows = sizes.vocab // layout.tp
    if not trained.all_weights:
        head_rows = trained.own_rows(sizes, layout.tp)[tp_rank]
    return {
        "workspace": workspace,
        "hidden rows": streams * batch.rows * row,
        "head's gradient": FP32 * sizes.hidden * head_rows,
    }


def flat_index_bytes(cf: CFConfig, items: int | None) -> dict[str, float]:
    """The flat indexes of a worker that computes rewards, where they lie on its GPU.

    Nothing where the number of items is not known. The FAISS is taken to be one for
    GPUs, as the extra `gpu` installs it.
    """
    if items is None or not keeps_index_on_gpu(cf):
        return {}
    return {
        "rewards: flat index": float(FP32 * cf.cf_folds * items * cf.hidden_size),
        "rewards: FAISS's scratch": float(INDEX_SCRATCH * cf.cf_folds * cf.reward_shards),
    }


def decoding_bytes(
    sizes: DecoderSizes, decoding: BeamBatch, layout: StepLayout
) -> dict[str, float]:
    """The caches of a validation's beam search, and its logits."""
    heads = max(1, sizes.kv_heads // layout.tp)
    token = 2 * sizes.layers * heads * sizes.head_dim * layout.element
    # Beams share their user's prefix; a step's new suffix stands beside the old one.
    positions = decoding.users * (decoding.prefix + 2 * decoding.beams * decoding.depth)
    return {
        "key/value caches": token * positions,
        "beam search": float(FP32 * BEAM_ELEMENTS * BEAM_COPIES),
    }


def checkpoint_bytes(parameters: Sequence[Parameter]) -> int:
    """Of a checkpoint's parts: master weights and
    moments in fp32, from which weights follow.

    What tensor parallelism does not cut is written by every rank of a group.
    """
    return (FP32 + MOMENTS_BYTES) * sum(
        sum(parameter.ranks) for parameter in parameters if parameter.is_trained
    )


def weights_files(
    sizes: DecoderSizes, layout: StepLayout, trained: TrainedParts, added: int
) -> tuple[int, int]:
    """Bytes of the best or the final weights, and of the largest file that a rank
    writes of them.

    All weights are written by all ranks, in the precision of the model, and their
    copies are in host memory meanwhile. Where most are frozen, rank 0 writes the
    adapters and the rows of the `added` tokens, whether these are trained or not.
    """
    if trained.all_weights:
        tensors = {
            str(number): StoredTensor(
                [size.total], ShardSpec(0) if size.cut else None, layout.element
            )
            for number, (_, _, size) in enumerate(sizes.tensors())
        }
        tp, dp = layout.tp, layout.dp
    else:
        with_rows = replace(trained, rows=(0, added))
        tensors = {
            str(number): StoredTensor([parameter.total], None, layout.element)
            for number, parameter in enumerate(parameters(sizes, with_rows, 1))
            if parameter.is_trained
        }
        tp = dp = 1
    files = plan_files(tensors, tp, dp)
    total = sum(tensor.piece_bytes(1) for tensor in tensors.values())
    return total, max(sum(tensors[name].piece_bytes(tp) for name in file.pieces) for file in files)
