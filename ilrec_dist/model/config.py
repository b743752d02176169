"""The configuration section `backbone`: the decoder."""

from __future__ import annotations

from typing import Literal, Optional

from ilrec_dist.common.config_fields import Bool, Fraction, Positive, PositiveFloat, section


@section
class BackboneConfig:
    """A decoder built by Megatron-core from these sizes."""

    num_layers: Positive = 4
    hidden_size: Positive = 128
    num_heads: Positive = 4
    num_kv_heads: Optional[Positive] = None  # None: as many as heads
    ffn_hidden_size: Optional[Positive] = None  # None: 4 × hidden_size
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    activation: Literal["gelu", "swiglu"] = "gelu"
    position_embedding: Literal["learned", "rope"] = "learned"
    bias: Bool = True
    qkv_bias: Bool = False  # biases on query, key and value although `bias` is false (Qwen2)
    qk_norm: Bool = False  # RMS norm of each query and key head (Qwen3)
    head_dim: Optional[Positive] = None  # None: hidden_size / num_heads
    norm_epsilon: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    rope_scaling_factor: Optional[PositiveFloat] = (
        None  # Llama 3.1's scaling of low frequencies (8; Llama 3.2: 32)
    )
    dropout: Fraction = 0.1  # on embeddings and residuals; attention itself has none
    tie_embeddings: Bool = True
    init_std: PositiveFloat = 0.02
    vocab_multiple: Positive = 8  # the vocabulary is padded to a multiple of this, whatever tp is
