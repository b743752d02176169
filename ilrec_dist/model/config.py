"""The configuration sections `backbone`,
the decoder, and `train.lora`, its adapters.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal, Optional, get_args

from annotated_types import MinLen

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    Fraction,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)


def _has_rope(config: Any) -> bool:
    return bool(config.backbone.position_embedding == "rope")


def _has_no_bias(config: Any) -> bool:
    return not bool(config.backbone.bias)


def _is_from_scratch(config: Any) -> bool:
    return config.backbone.from_ is None


def _is_pretrained(config: Any) -> bool:
    return config.backbone.from_ is not None


def _has_new_tokens(config: Any) -> bool:
    return bool(config.items.form != "titles")


# Fields that say something of a pretrained model.
PRETRAINED = OnlyIf("a model in backbone.from", _is_pretrained)

# Fields that the config.json of a pretrained model decides.
FROM_SCRATCH = OnlyIf(
    "backbone.from null (a pretrained model's config.json decides it)", _is_from_scratch
)


@section(affects="train")
class BackboneConfig:
    """A decoder built by Megatron-core from these
    sizes, or a pretrained one from its folder.
    """

    # The folder of a Hugging Face model, or a GGUF file; null: a decoder trained from scratch.
    # The stages read its bytes as an input, so that the path itself does not matter.
    from_: Annotated[Optional[Annotated[str, MinLen(1)]], Affects()] = None
    # What the rows of added item tokens begin with (METHOD.md §10).
    new_tokens: Annotated[
        Literal["moments", "text"],
        PRETRAINED,
        OnlyIf("items.form semantic or atomic, whose items are new tokens", _has_new_tokens),
    ] = "moments"
    num_layers: Annotated[Positive, FROM_SCRATCH] = 4
    hidden_size: Annotated[Positive, FROM_SCRATCH] = 128
    num_heads: Annotated[Positive, FROM_SCRATCH] = 4
    # None: as many as heads.
    num_kv_heads: Annotated[Optional[Positive], FROM_SCRATCH] = None
    # None: 4 × hidden_size.
    ffn_hidden_size: Annotated[Optional[Positive], FROM_SCRATCH] = None
    normalization: Annotated[Literal["LayerNorm", "RMSNorm"], FROM_SCRATCH] = "LayerNorm"
    activation: Annotated[Literal["gelu", "swiglu"], FROM_SCRATCH] = "gelu"
    position_embedding: Annotated[Literal["learned", "rope"], FROM_SCRATCH] = "learned"
    bias: Annotated[Bool, FROM_SCRATCH] = True
    # Biases on query, key and value although `bias` is false (Qwen2).
    qkv_bias: Annotated[
        Bool,
        FROM_SCRATCH,
        OnlyIf("backbone.bias false, which would put biases there already", _has_no_bias),
    ] = False
    # An RMS norm of each query and key head (Qwen3).
    qk_norm: Annotated[Bool, FROM_SCRATCH] = False
    # None: hidden_size / num_heads.
    head_dim: Annotated[Optional[Positive], FROM_SCRATCH] = None
    norm_epsilon: Annotated[PositiveFloat, FROM_SCRATCH] = 1e-5
    rope_theta: Annotated[
        PositiveFloat, FROM_SCRATCH, OnlyIf("backbone.position_embedding rope", _has_rope)
    ] = 10000.0
    # Llama 3's scaling of the low frequencies (Llama 3.1: 8, Llama 3.2: 32); None: none.
    rope_scaling_factor: Annotated[
        Optional[PositiveFloat],
        FROM_SCRATCH,
        OnlyIf("backbone.position_embedding rope", _has_rope),
    ] = None
    # On embeddings and residuals. Attention itself has no dropout.
    dropout: Annotated[Fraction, FROM_SCRATCH] = 0.1
    tie_embeddings: Annotated[Bool, FROM_SCRATCH] = True
    init_std: Annotated[PositiveFloat, FROM_SCRATCH] = 0.02
    # The vocabulary is padded to a multiple of this, whatever tp is.
    vocab_multiple: Positive = 8


# The linear layers that may have adapters, by their names in the checkpoint.
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGET_MODULES: tuple[TargetModule, ...] = get_args(TargetModule)

# What of a pretrained model is trained: all weights, LoRA adapters, the rows of the added item
# tokens, or both of these.
Trainable = Literal["full", "lora", "lora+new_rows", "new_rows"]


@section(affects="train")
class LoraConfig:
    """Which linear layers get adapters of which size (METHOD.md §10)."""

    rank: Positive = 16
    # The adapter's output is scaled by alpha / rank.
    alpha: PositiveFloat = 32.0
    target_modules: Annotated[list[TargetModule], MinLen(1)] = field(
        default_factory=lambda: list(TARGET_MODULES)
    )
    # On the adapter's input; only without tensor parallelism, where activations are whole.
    dropout: Fraction = 0.0

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def tensor_parallel_problem(config: BackboneConfig, tp: int) -> str | None:
    """Why the decoder cannot be cut over `tp` ranks; None where it can.

    The vocabulary's rows are no part of this. With fewer key/value heads than ranks
    the rows of the joint projection are cut evenly and its output is gathered, so
    that each rank sees its key/value head, which tp / heads_kv ranks share.
    """
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    sizes = {
        "attention heads": heads,
        "columns of the feed-forward": config.ffn_hidden_size or 4 * config.hidden_size,
    }
    if groups >= tp:
        sizes["key/value heads"] = groups
    else:
        head_dim = config.head_dim or config.hidden_size // heads
        sizes["columns of query, key and value"] = (heads + 2 * groups) * head_dim
    for what, size in sizes.items():
        if size % tp:
            return f"tp {tp} does not divide the backbone's {size} {what}; choose a tp that does"
    if groups < tp and tp % groups:
        return (
            f"tp {tp} is not a multiple of the backbone's {groups} key/value heads; choose a tp "
            "that is, or one that divides them"
        )
    return None


def linear_shapes(config: BackboneConfig) -> dict[TargetModule, tuple[int, int]]:
    """[out, in] of each of a layer's linear maps, by its name in a checkpoint."""
    d, heads = config.hidden_size, config.num_heads
    head_dim = config.head_dim or d // heads
    groups = config.num_kv_heads or heads
    feed_forward = config.ffn_hidden_size or 4 * d
    shapes: dict[TargetModule, tuple[int, int]] = {
        "q_proj": (heads * head_dim, d),
        "k_proj": (groups * head_dim, d),
        "v_proj": (groups * head_dim, d),
        "o_proj": (d, heads * head_dim),
        "up_proj": (feed_forward, d),
        "down_proj": (d, feed_forward),
    }
    if config.activation == "swiglu":
        shapes["gate_proj"] = (feed_forward, d)
    return shapes
