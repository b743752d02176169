"""Memory of one GPU by part, while it trains and while it validates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilrec_dist.model.sharding import ShardSpec
from ilrec_dist.model.weight_layout import StoredTensor, plan_files
from ilrec_dist.objective.config import ObjectiveConfig, num_intermediate_layers
from ilrec_dist.plan.communication import FP32, MicroBatch, StepLayout, streams_take_part
from ilrec_dist.plan.decoder import DecoderSizes, FlatGroup

MIB = 1 << 20
# The loss's workspace on a GPU where objective.workspace_mib is null (ilrec_kernels.plan).
LOSS_WORKSPACE = 1024 * MIB
# DeepSpeed's reduce_bucket_size, in gradients; its buffer has this size whatever the model's is.
BUCKET_GRADIENTS = 500_000_000
GRADIENTS = "gradients"
# Adam's two moments, in fp32.
MOMENTS_BYTES = 8
# CUDA's context, cuBLAS and NCCL's channels of the tp and dp groups: about what an H100 shows.
RESERVED = 1536 * MIB
# The share of the rest that the allocator loses to fragments.
FRAGMENTS = 0.05
# Logits and candidates of a beam search in memory at once (inference.beam_search), fp32, and the
# copies that its softmax and top-k make of them.
BEAM_ELEMENTS, BEAM_COPIES = 1 << 27, 3


@dataclass(frozen=True)
class Decoding:
    """A batch of a validation's beam search."""

    users: int
    beams: int
    prefix: int
    depth: int


def state_bytes(
    parameters: int, groups: Sequence[FlatGroup], layout: StepLayout
) -> dict[str, float]:
    """Weights, gradients and optimizer state of a rank.

    parameters: all of the rank's, and groups: those that it trains. The optimizer state
    is divided over the dp ranks. Gradients in fp32 with one micro-batch a step, or
    under ZeRO 2, go through DeepSpeed's bucket, and a rank keeps those of the
    parameters of which it updates a part. With more micro-batches it keeps all until
    the last one. In bf16 under ZeRO 1 it keeps all in bf16 and their sum in fp32.
    """
    trainable = sum(group.padded for group in groups)
    share = trainable / layout.dp
    if layout.keeps_gradients:
        gradients = (FP32 + layout.element) * trainable
    elif layout.accumulation_steps > 1 and layout.zero_stage == 1:
        gradients = FP32 * trainable
    else:
        gradients = FP32 * sum(group.touched() for group in groups)
    padding = trainable - sum(sum(group.sizes) for group in groups)
    return {
        "weights": layout.element * (parameters + padding),
        GRADIENTS: gradients,
        # In fp32 they are the weights themselves.
        "master weights": FP32 * share if layout.element < FP32 else 0.0,
        "moments": MOMENTS_BYTES * share,
    }


def bucket_bytes(trainable: int, layout: StepLayout) -> float:
    """The buffer through which gradients go to be summed over the dp ranks.

    In bf16 under ZeRO 1 they are copied into one as large as they
    need; otherwise DeepSpeed allocates it whatever the model's
    size is, under ZeRO 2 in the precision of the weights. A
    lone rank in fp32 has none (training.engine).
    """
    if layout.dp == 1 and layout.element == FP32:
        return 0.0
    if layout.keeps_gradients:
        return float(FP32 * min(trainable, BUCKET_GRADIENTS))
    return float((FP32 if layout.zero_stage == 1 else layout.element) * BUCKET_GRADIENTS)


def activation_bytes(
    sizes: DecoderSizes, batch: MicroBatch, layout: StepLayout, recompute: bool = False
) -> float:
    """What autograd keeps of a micro-batch's layers until backward.

    With `recompute` only the layers' inputs, and everything of one layer at a time.
    """
    layer = _layer_activations(sizes, layout) * batch.tokens
    embedding = 0
    if sizes.config.dropout > 0:
        # The mask of the embeddings.
        embedding = batch.tokens * sizes.hidden * (1 if layout.is_cuda else layout.element)
    if sizes.config.position_embedding == "rope":
        # Cosines and sines, which all layers share.
        embedding += 2 * batch.tokens_per_sequence * sizes.head_dim * layout.element
    if recompute:
        kept = sizes.layers * sizes.hidden * layout.element * batch.tokens
        return embedding + kept + layer
    return embedding + sizes.layers * layer


def _layer_activations(sizes: DecoderSizes, layout: StepLayout) -> float:
    """Bytes a token that one layer keeps; the projections' are divided over tp."""
    element = layout.element
    # What goes into each of the two norms, which is the residual stream, and what comes out.
    whole = 2 * (_norm_input(sizes, layout) + sizes.hidden * element)
    if sizes.config.dropout > 0:
        # The masks of the two outputs.
        whole += 2 * sizes.hidden * (1 if layout.is_cuda else element)
    # On a CPU in bf16 the attention itself works on copies in fp32.
    copied = element < FP32 and not layout.is_cuda
    inner = FP32 if copied else element
    # The output of the attention, and what its backward pass needs of each head's softmax.
    cut = sizes.query_width * (element + copied * inner) + FP32 * sizes.heads
    queries_and_keys = sizes.query_width + sizes.kv_heads * sizes.head_dim
    values = sizes.kv_heads * sizes.head_dim * inner
    if sizes.config.position_embedding == "rope":
        # After the rotation, and the values, which are by themselves then.
        cut += queries_and_keys * inner + values
    else:
        # The joint projection.
        cut += sizes.qkv_width * inner
    if sizes.config.qk_norm:
        # The joint projection after all; normalised, and on a CPU in bf16 as fp32 copies.
        cut += sizes.qkv_width * element - (0 if copied else values)
        copies = 1 if layout.is_cuda or element == FP32 else 2
        cut += copies * queries_and_keys * (element if layout.is_cuda else FP32)
        cut += FP32 * (sizes.heads + sizes.kv_heads)
    # Before and after the activation.
    cut += (sizes.fc1_width + sizes.ffn) * element
    return whole + cut / layout.tp


def _norm_input(sizes: DecoderSizes, layout: StepLayout) -> int:
    """Bytes a row that a norm keeps of its input, with the statistics.

    torch computes an RMS norm in one kernel on GPUs only; on CPUs in
    bf16 it keeps the row in fp32 and the normalised row before the weight.
    """
    if sizes.config.normalization == "LayerNorm":
        return sizes.hidden * layout.element + 2 * FP32
    is_whole = layout.is_cuda or layout.element == FP32
    return sizes.hidden * (layout.element if is_whole else 2 * FP32) + FP32


def loss_bytes(
    sizes: DecoderSizes,
    objective: ObjectiveConfig,
    batch: MicroBatch,
    layout: StepLayout,
    head_is_trained: bool = True,
) -> dict[str, float]:
    """The loss's workspace, the head's gradient
    in fp32, and the hidden rows of all streams.
    """
    workspace = LOSS_WORKSPACE if objective.workspace_mib is None else objective.workspace_mib * MIB
    streams = 1
    if streams_take_part(objective):
        streams += num_intermediate_layers(objective, sizes.layers)
    # What each stream's norm keeps, and the gradient of what comes out of it.
    row = _norm_input(sizes, layout) + sizes.hidden * layout.element
    return {
        "workspace": workspace,
        "hidden rows": streams * batch.rows * row,
        "head's gradient": FP32 * sizes.hidden * sizes.vocab // layout.tp * head_is_trained,
    }


def decoding_bytes(sizes: DecoderSizes, decoding: Decoding, layout: StepLayout) -> dict[str, float]:
    """The caches of a validation's beam search, and its logits."""
    heads = max(1, sizes.kv_heads // layout.tp)
    token = 2 * sizes.layers * heads * sizes.head_dim * layout.element
    # Beams share their user's prefix; a step's new suffix stands beside the old one.
    positions = decoding.users * (decoding.prefix + 2 * decoding.beams * decoding.depth)
    return {
        "key/value caches": token * positions,
        "beam search": float(FP32 * BEAM_ELEMENTS * BEAM_COPIES),
    }


def checkpoint_bytes(trainable: int) -> int:
    """Of a checkpoint's parts: master weights and
    moments in fp32, from which weights follow.
    """
    return (FP32 + MOMENTS_BYTES) * trainable


def weights_file_bytes(sizes: DecoderSizes, layout: StepLayout) -> int:
    """The largest file that a rank writes of the best or the final weights.

    Its tensors are in host memory, in fp32, while it is written.
    """
    tensors = {
        str(number): StoredTensor([size.total], ShardSpec(0) if size.cut else None)
        for number, (_, _, size) in enumerate(sizes.tensors())
    }
    files = plan_files(tensors, layout.tp, layout.dp)
    return max(sum(tensors[name].piece_bytes(layout.tp) for name in file.pieces) for file in files)
