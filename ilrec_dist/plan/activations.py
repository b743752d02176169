"""What autograd keeps of a micro-batch's layers until the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from ilrec_dist.plan.communication import FP32, MicroBatch, StepLayout
from ilrec_dist.plan.decoder import DecoderSizes
from ilrec_dist.plan.trained import ALL_WEIGHTS, Linear, TrainedParts, linears


@dataclass
class Kept:
    """Bytes for each token, for each of those between whose products the rank works,
    and bytes whatever the number of tokens is.
    """

    token: float = 0.0
    between: float = 0.0
    once: float = 0.0

    def of(self, tokens: int, tokens_between: int) -> float:
        return self.token * tokens + self.between * tokens_between + self.once


def activation_bytes(
    sizes: DecoderSizes,
    batch: MicroBatch,
    layout: StepLayout,
    trained: TrainedParts = ALL_WEIGHTS,
    recompute: bool = False,
) -> float:
    """Of all layers; with `recompute` only the layers' inputs, and everything of one
    layer at a time.
    """
    tokens, residual = batch.tokens, sizes.hidden * layout.element
    between = layout.tokens_per_rank(tokens)
    first, later = (
        _Layer(sizes, trained, layout, batch.is_packed, is_first).kept().of(tokens, between)
        for is_first in (True, False)
    )
    embedding = 0.0
    if sizes.config.dropout > 0 and (trained.all_weights or trained.rows is not None):
        # The mask of the embeddings.
        embedding = between * sizes.hidden * (1 if layout.is_cuda else layout.element)
    if sizes.config.position_embedding == "rope":
        # Cosines and sines, which all layers share.
        positions = tokens if batch.is_packed else batch.tokens_per_sequence
        embedding += 2 * positions * sizes.head_dim * layout.element
    if not recompute:
        return embedding + first + (sizes.layers - 1) * later
    # Its input is among the layers' inputs.
    largest = (later if sizes.layers > 1 else first) - between * residual
    return embedding + sizes.layers * between * residual + largest


class _Layer:
    """One layer, from its first norm to its last product.

    What belongs to heads and to the feed-forward's inner features is divided over tp.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        trained: TrainedParts,
        layout: StepLayout,
        is_packed: bool,
        is_first: bool,
    ) -> None:
        self.sizes, self.trained, self.layout = sizes, trained, layout
        self.is_packed, self.needs = is_packed, trained.needs(sizes, is_first)
        self.linears = {linear.name: linear for linear in linears(sizes)}
        # On a CPU in bf16 the attention works on copies in fp32, which it makes again.
        self.copies = layout.element < FP32 and not layout.is_cuda
        self.total = Kept()

    def kept(self) -> Kept:
        sizes, layout, needs = self.sizes, self.layout, self.needs
        all_weights, element = self.trained.all_weights, layout.element
        if all_weights or needs.inputs:
            self.total.between += norm_bytes(sizes, layout)
        # Adapters make the outputs of the norms and of SwiGLU again, from what these keep.
        remakes = not all_weights
        inputs = all_weights or needs.inputs
        self._enter("linear_qkv", sizes.hidden, inputs, remakes and needs.inputs)
        if needs.joint:
            self.total.token += self._attention()
        # The attention's own copy of its output serves the projection as well, unless it is in
        # another order or precision.
        is_shared = needs.joint and not self.copies and not self.is_packed
        self._enter("linear_proj", sizes.query_width / layout.tp, needs.joint, is_shared)
        if all_weights or needs.middle:
            self.total.between += norm_bytes(sizes, layout)
        self._enter(
            "linear_fc1", sizes.hidden, all_weights or needs.middle, remakes and needs.middle
        )
        if needs.expanded:
            # Before the activation.
            self.total.token += sizes.fc1_width * element / layout.tp
        remakes = remakes and needs.expanded and sizes.config.activation == "swiglu"
        self._enter("linear_fc2", sizes.ffn / layout.tp, needs.expanded, remakes)
        if sizes.config.dropout > 0:
            # The masks of the two outputs.
            self.total.between += 2 * sizes.hidden * (1 if layout.is_cuda else element)
        return self.total

    def _enter(self, name: str, width: float, needs: bool, is_kept: bool = False) -> None:
        """What a linear map and its adapters keep: their input, of `width` features on
        this rank, the adapters' factors A side by side, and what comes out of these.

        needs: whether the input needs a gradient; is_kept: whether it is kept anyway. A
        frozen map without adapters keeps nothing.
        """
        linear: Linear = self.linears[name]
        element, lora = self.layout.element, self.trained.lora
        count = self.trained.adapters(linear)
        dropout = 0.0 if lora is None or count == 0 else lora.dropout
        kept = 0.0
        if (self.trained.all_weights or count) and not is_kept and dropout == 0:
            kept += width * element
        if dropout > 0:
            kept += width * element
            if needs:
                kept += width * (1 if self.layout.is_cuda else element)
        out = 0.0 if lora is None else count * lora.rank * element
        # Cut tokens come together in a column-parallel map, and go apart behind a row-parallel one.
        if linear.is_row_parallel:
            kept, out = out, kept
        self.total.between += kept
        self.total.token += out
        if lora is not None and needs:
            self.total.once += count * lora.rank * width * element

    def _attention(self) -> float:
        """Bytes a token of the attention on this rank."""
        sizes, layout = self.sizes, self.layout
        element = layout.element
        heads, groups = sizes.heads / layout.tp, max(1.0, sizes.kv_heads / layout.tp)
        queries, keys = heads * sizes.head_dim, groups * sizes.head_dim
        # Queries, keys and values: after the rotation, the values by themselves; with learned
        # positions as the joint projection.
        total = (queries + 2 * keys) * element
        if not self.copies:
            # Its output, and what its backward pass needs of each head's softmax.
            total += queries * element + FP32 * heads
        if sizes.config.qk_norm:
            total += self._head_norms(queries + keys, heads + groups)
            if not self.copies and not self.is_packed:
                # The values are a part of the joint projection, which the norms keep.
                total -= keys * element
        return total

    def _head_norms(self, width: float, heads: float) -> float:
        """Bytes a token that the norms of this rank's query and key heads keep."""
        sizes, layout = self.sizes, self.layout
        # Ranks that share key/value heads have the whole joint projection.
        is_shared = sizes.kv_heads < layout.tp
        joint = sizes.qkv_width * layout.element / (1 if is_shared else layout.tp)
        if layout.is_cuda:
            return joint + FP32 * heads
        # As fp32 copies in bf16; for the weight's gradient also what it is multiplied with.
        inputs = width * FP32 if self.copies else joint
        return inputs + FP32 * heads + (width * FP32 if self.trained.all_weights else 0)


def norm_bytes(sizes: DecoderSizes, layout: StepLayout) -> int:
    """Bytes a row that a norm keeps: its input, and the statistics."""
    statistics = (2 if sizes.config.normalization == "LayerNorm" else 1) * FP32
    return sizes.hidden * layout.element + statistics
