"""The configuration section `backbone`: the decoder."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from ilrec_dist.common.config_fields import Bool, Fraction, OnlyIf, Positive, PositiveFloat, section


def _has_rope(config: Any) -> bool:
    return bool(config.backbone.position_embedding == "rope")


def _has_no_bias(config: Any) -> bool:
    return not bool(config.backbone.bias)


@section(affects="train")
class BackboneConfig:
    """A decoder built by Megatron-core from these sizes."""

    num_layers: Positive = 4
    hidden_size: Positive = 128
    num_heads: Positive = 4
    # None: as many as heads.
    num_kv_heads: Optional[Positive] = None
    # None: 4 × hidden_size.
    ffn_hidden_size: Optional[Positive] = None
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    activation: Literal["gelu", "swiglu"] = "gelu"
    position_embedding: Literal["learned", "rope"] = "learned"
    bias: Bool = True
    # Biases on query, key and value although `bias` is false (Qwen2).
    qkv_bias: Annotated[
        Bool, OnlyIf("backbone.bias false, which would put biases there already", _has_no_bias)
    ] = False
    # An RMS norm of each query and key head (Qwen3).
    qk_norm: Bool = False
    # None: hidden_size / num_heads.
    head_dim: Optional[Positive] = None
    norm_epsilon: PositiveFloat = 1e-5
    rope_theta: Annotated[PositiveFloat, OnlyIf("backbone.position_embedding rope", _has_rope)] = (
        10000.0
    )
    # Llama 3's scaling of the low frequencies (Llama 3.1: 8, Llama 3.2: 32); None: none.
    rope_scaling_factor: Annotated[
        Optional[PositiveFloat], OnlyIf("backbone.position_embedding rope", _has_rope)
    ] = None
    # On embeddings and residuals. Attention itself has no dropout.
    dropout: Fraction = 0.1
    tie_embeddings: Bool = True
    init_std: PositiveFloat = 0.02
    # The vocabulary is padded to a multiple of this, whatever tp is.
    vocab_multiple: Positive = 8
