"""From BackboneConfig to Megatron-core: its configuration and layer specification.

No module here needs a CUDA extension, so that one model serves CPU and CUDA.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ilrec_dist.model.attention import AttentionContext, CoreAttention, KVCache, PackedSequences
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.elementwise import Rotary, normed, rotate, swiglu
from ilrec_dist.model.sequence_parallel import TokenCut

Precision = Literal["fp32", "bf16"]


class _GatherFeatures(torch.autograd.Function):
    """Concatenate the last dimension over the tensor-parallel group.

    The ranks use different parts of the result, so backward sums its gradients over the
    group and takes this rank's part.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return torch.cat(shards, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's column-parallel linear layer, whose input may be cut by tokens."""

    def forward(self, inputs: Tensor, cut: TokenCut | None = None) -> tuple[Tensor, Tensor | None]:
        """inputs [B, S, in], or this rank's tokens of a cut → [B, S, out / tp].

        The second result is a bias that is not yet added.
        """
        if cut is None:
            output: tuple[Tensor, Tensor | None] = super().forward(inputs)
            return output
        added, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return cut.column_product(inputs, self.weight, added), left


class RowLinear(RowParallelLinear):  # type: ignore[misc]
    """Megatron's row-parallel linear layer, whose output may be cut by tokens."""

    def forward(self, inputs: Tensor, cut: TokenCut | None = None) -> tuple[Tensor, Tensor | None]:
        """inputs [B, S, in / tp] → [B, S, out], or this rank's tokens of a cut.

        The second result is the bias, which is not yet added. The product is Megatron's
        own in both cases, and only the sum over the ranks is another.
        """
        if cut is None:
            output: tuple[Tensor, Tensor | None] = super().forward(inputs)
            return output
        partial = self._forward_impl(
            input=inputs,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
            grad_output_buffer=None,
        )
        return cut.scattered_sum(partial), self.bias


class DecoderAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention with a forward that hands an attention context on."""

    def forward(
        self,
        hidden: Tensor,
        context: AttentionContext,
        rotary: Rotary | None,
        cut: TokenCut | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [B, S, d], or this rank's tokens of it → as much of the output, and
        its bias, not yet added.
        """
        joint, _ = self.linear_qkv(hidden, cut)
        if self.config.num_query_groups < self.tp_group.size():
            query, key, value = self._shared_key_value_heads(joint)
        else:
            query, key, value = self._own_heads(joint)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
            packed = isinstance(context, PackedSequences)
            # In fp32 and on GPUs the heads' norms keep the joint projection.
            in_bf16 = value.dtype == torch.bfloat16 and not value.is_cuda
            is_kept = self.q_layernorm is not None and not in_bf16
            if value.requires_grad and not is_kept and not packed:
                # A view would keep the whole joint projection until the backward pass.
                value = value.clone()
        output: tuple[Tensor, Tensor | None] = self.linear_proj(
            self.core_attention(query, key, value, context), cut
        )
        return output

    def _own_heads(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, S, heads / tp, head_dim], key and value [B, S, heads_kv / tp,
        head_dim] of this rank's joint projection, which has each key/value head behind
        its query heads.
        """
        width, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        joint = joint.view(*joint.shape[:-1], groups, -1)
        sizes = [joint.shape[-1] - 2 * width, width, width]
        query, key, value = torch.split(joint, sizes, dim=-1)
        return query.reshape(*query.shape[:2], -1, width), key, value

    def _shared_key_value_heads(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, S, heads / tp, head_dim], key and value [B, S, 1, head_dim].

        There are fewer key/value heads than ranks. The rows of the joint projection are
        cut evenly, its output is gathered, and tp / heads_kv ranks use the same
        key/value head. (Megatron's own form of this gathers on CUDA devices only.)
        """
        tp, rank, groups = self.tp_group.size(), self.tp_group.rank(), self.config.num_query_groups
        joint = _GatherFeatures.apply(joint, self.tp_group)  # type: ignore[no-untyped-call]
        joint = joint.view(*joint.shape[:-1], groups, -1, self.hidden_size_per_attention_head)
        sharing = tp // groups
        group = joint[..., rank // sharing, :, :]  # [B, S, queries of the group + 2, head_dim]
        query = group[..., :-2, :].chunk(sharing, dim=-2)[rank % sharing]
        return query, group[..., -2:-1, :], group[..., -1:, :]


class DecoderLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, run as a pre-norm decoder layer.

    The parent's forward turns gradients on even under no_grad, so this one replaces it.
    """

    def forward(
        self,
        hidden: Tensor,
        context: AttentionContext,
        rotary: Rotary | None,
        cut: TokenCut | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """hidden [B, S, d] → [B, S, d]; rotary is None with learned positions.

        The last layer of a prefill gives [B, 1, d], the prefixes' last tokens. With a
        cut both are this rank's tokens of it. With `recompute` autograd keeps the input
        alone. The layer is computed again within it, so that hooks on it are called
        once a pass.
        """
        if recompute:
            again: Tensor = checkpoint(self._run, hidden, context, rotary, cut, use_reentrant=False)
            return again
        return self._run(hidden, context, rotary, cut)

    def _run(
        self,
        hidden: Tensor,
        context: AttentionContext,
        rotary: Rotary | None,
        cut: TokenCut | None,
    ) -> Tensor:
        prefixes: KVCache | None = None
        if isinstance(context, KVCache) and context.reads_ends(self.layer_number - 1):
            prefixes = context
        inputs, hidden = normed(self.input_layernorm, hidden, cut)
        attended = self.self_attention(inputs, context, rotary, cut)
        if prefixes is not None:
            hidden = prefixes.at_ends(hidden)
        hidden = self._add(attended, hidden, cut)
        inputs, hidden = normed(self.pre_mlp_layernorm, hidden, cut)
        return self._add(self._feed_forward(inputs, cut), hidden, cut)

    def _feed_forward(self, inputs: Tensor, cut: TokenCut | None) -> tuple[Tensor, Tensor | None]:
        """Megatron's, whose gated form is SwiGLU: output and bias, not yet added."""
        mlp: Any = self.mlp
        expanded, bias = mlp.linear_fc1(inputs, cut)
        if bias is not None:
            expanded = expanded + bias
        activation = swiglu if self.config.gated_linear_unit else mlp.activation_func
        output: tuple[Tensor, Tensor | None] = mlp.linear_fc2(activation(expanded), cut)
        return output

    def _add(
        self,
        out_and_bias: tuple[Tensor, Tensor | None],
        residual: Tensor,
        cut: TokenCut | None,
    ) -> Tensor:
        out, bias = out_and_bias
        if bias is not None:
            out = out + (bias if cut is None else cut.shared(bias))
        return residual + F.dropout(out, self.hidden_dropout, self.training)


class HeadNorm(torch.nn.Module):
    """RMS norm of each query or key head.

    One weight serves the heads of all ranks, so its gradient is summed over the tp
    group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        """heads [B, S, heads, head_dim] → the same shape."""
        return F.rms_norm(
            heads, self.weight.shape, copy_to_tensor_model_parallel_region(self.weight), self.eps
        )


def transformer_config(config: BackboneConfig, precision: Precision, tp: int) -> TransformerConfig:
    """Megatron's configuration, without what it fuses by CUDA extensions."""
    gated = config.activation == "swiglu"
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads or config.num_heads,
        kv_channels=config.head_dim or config.hidden_size // config.num_heads,
        ffn_hidden_size=config.ffn_hidden_size or 4 * config.hidden_size,
        normalization=config.normalization,
        activation_func=F.silu if gated else F.gelu,
        gated_linear_unit=gated,
        layernorm_epsilon=config.norm_epsilon,
        add_bias_linear=config.bias,
        add_qkv_bias=config.bias or config.qkv_bias,
        hidden_dropout=config.dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        bf16=precision == "bf16",
        use_cpu_initialization=True,
        # sharding.init_tensor draws the weights, independent of tp.
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )


def layer_spec(config: BackboneConfig) -> TransformerBlockSubmodules:
    """The layer specification with our attention, and the one final norm."""
    head_norm: Any = HeadNorm if config.qk_norm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnLinear,
        core_attention=CoreAttention,
        linear_proj=RowLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            DecoderAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=ModuleSpec(
            MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    layer: Any = ModuleSpec(DecoderLayer, submodules=submodules)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers, layer_norm=WrappedTorchNorm
    )
