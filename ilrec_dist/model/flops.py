"""The floating-point operations of a training,
from its configuration and what was counted.

Counted are the multiplications and additions of every matrix
product: the decoder's layers, its attention and the output head.
Norms, softmaxes and what is done element by element are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilrec_dist.model.config import BackboneConfig

# A backward pass computes two products for each one of the forward pass.
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Work:
    """What goes through the model, over all ranks."""

    # Input tokens without padding.
    tokens: float
    # Tokens that a token attends to, on average.
    context: float
    # Rows that go through the output head.
    rows: float


def forward_flops(config: BackboneConfig, work: Work, head_columns: Sequence[float]) -> float:
    """FLOPs of one forward pass.

    head_columns: for each stream of hidden rows that goes
    through the head, final layer and intermediate ones, how many
    columns of the vocabulary a row's logits are computed for.
    """
    d, heads = config.hidden_size, config.num_heads
    head_dim = config.head_dim or d // heads
    groups = config.num_kv_heads or heads
    feed_forward = config.ffn_hidden_size or 4 * d
    attention = d * (heads + 2 * groups) * head_dim + heads * head_dim * d
    mlp = (3 if config.activation == "swiglu" else 2) * d * feed_forward
    # Queries times keys, and weights times values.
    scores = 2 * work.context * heads * head_dim
    layers = config.num_layers * work.tokens * (attention + mlp + scores)
    return 2.0 * (layers + work.rows * d * sum(head_columns))


def training_flops(config: BackboneConfig, work: Work, head_columns: Sequence[float]) -> float:
    """FLOPs of forward and backward passes of a
    training in which all weights are trained.
    """
    return FORWARD_AND_BACKWARD * forward_flops(config, work, head_columns)
