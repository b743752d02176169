"""BackboneConfig → Megatron-core: the transformer configuration and the layer specification, in modules that need no extra packages."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
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

from ilrec_dist.model.attention import CoreAttention, KVCache
from ilrec_dist.model.config import BackboneConfig

Precision = Literal["fp32", "bf16"]


class DecoderLayer(TransformerLayer):
    """Megatron's layer, run as the pre-norm decoder layer it is; the parent's forward turns gradients on even under no_grad."""

    def forward(self, hidden: Tensor, cache: KVCache | None, rotary: Tensor | None) -> Tensor:  # type: ignore[override]
        """hidden [B, S, d] → [B, S, d]; rotary angles [1, S, 1, head_dim] or None."""
        out = self.self_attention(
            self.input_layernorm(hidden), attention_mask=cache, rotary_pos_emb=rotary
        )
        hidden = self._add(out, hidden)
        out = self.mlp(self.pre_mlp_layernorm(hidden))
        return self._add(out, hidden)

    def _add(self, out_and_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        out, bias = out_and_bias
        if bias is not None:
            out = out + bias
        return residual + F.dropout(out, self.hidden_dropout, self.training)


class HeadNorm(torch.nn.Module):
    """RMS norm of each head. Its one weight serves the heads of all ranks, so its gradient is summed over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        """heads [B, S, heads, head_dim] → the same shape."""
        return F.rms_norm(
            heads, self.weight.shape, copy_to_tensor_model_parallel_region(self.weight), self.eps
        )


def padded_vocab_size(config: BackboneConfig, vocab_size: int) -> int:
    """vocab_size rounded up to a multiple of config.vocab_multiple, whatever tp is."""
    return math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple


def transformer_config(config: BackboneConfig, precision: Precision, tp: int) -> TransformerConfig:
    """Everything that Megatron fuses with CUDA extensions is off, so that one model serves CPU and CUDA."""
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
        perform_initialization=False,  # weights.py draws them, independent of tp
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )


def layer_spec(config: BackboneConfig) -> TransformerBlockSubmodules:
    """The local layer specification with our core attention, and the one final norm (METHOD.md §1)."""
    head_norm: Any = HeadNorm if config.qk_norm else None
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CoreAttention,
        linear_proj=RowParallelLinear,  # type: ignore[arg-type]
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=ModuleSpec(
            MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    layer: Any = ModuleSpec(DecoderLayer, submodules=submodules)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers, layer_norm=WrappedTorchNorm
    )
