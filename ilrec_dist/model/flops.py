"""The floating-point operations of a training,
from its configuration and what was counted.

Counted are the multiplications and additions of every matrix
product: the decoder's layers, its attention and the output head.
Norms, softmaxes and what is done element by element are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilrec_dist.model.config import BackboneConfig, LoraConfig, linear_shapes


@dataclass(frozen=True)
class Work:
    """What goes through the model, over all ranks."""

    # Input tokens without padding.
    tokens: float
    # Tokens that a token attends to, on average.
    context: float
    # Rows that go through the output head.
    rows: float


@dataclass(frozen=True)
class Trained:
    """What of the model is trained: all weights, or adapters and rows of added tokens
    beside frozen weights.
    """

    all_weights: bool = True
    lora: LoraConfig | None = None
    # Rows of the embedding and of the head.
    new_rows: int = 0


ALL_WEIGHTS = Trained()


def forward_flops(
    config: BackboneConfig,
    work: Work,
    head_columns: Sequence[float],
    lora: LoraConfig | None = None,
) -> float:
    """FLOPs of one forward pass.

    head_columns: for each stream of hidden rows that goes
    through the head, final layer and intermediate ones, how many
    columns of the vocabulary a row's logits are computed for.
    """
    linear = sum(rows * columns for rows, columns in linear_shapes(config).values())
    token = linear + _scores(config, work) + _adapters(config, lora)
    head = work.rows * config.hidden_size * sum(head_columns)
    return 2.0 * (config.num_layers * work.tokens * token + head)


def training_flops(
    config: BackboneConfig,
    work: Work,
    head_columns: Sequence[float],
    trained: Trained = ALL_WEIGHTS,
) -> float:
    """FLOPs of forward and backward passes of a training.

    A backward pass computes two products for each one of the forward pass, with regard
    to its two factors. Frozen weights spare the one with regard to them; the head, that
    of all rows but the trained ones. Where the embedding is frozen, the first layer's
    query, key and value need no gradient of their input.
    """
    forward = forward_flops(config, work, head_columns, trained.lora)
    if trained.all_weights:
        return 3 * forward
    shapes = linear_shapes(config)
    linear = sum(rows * columns for rows, columns in shapes.values())
    token = linear + 2 * _scores(config, work) + 2 * _adapters(config, trained.lora)
    layers = config.num_layers * work.tokens * token
    if not trained.new_rows:
        first = {name: shapes[name] for name in ("q_proj", "k_proj", "v_proj")}
        layers -= work.tokens * sum(rows * columns for rows, columns in first.values())
        if trained.lora is not None:
            targeted = sum(name in trained.lora.target_modules for name in first)
            layers -= work.tokens * targeted * trained.lora.rank * config.hidden_size
    columns = sum(columns + min(columns, trained.new_rows) for columns in head_columns)
    return forward + 2.0 * (layers + work.rows * config.hidden_size * columns)


def _scores(config: BackboneConfig, work: Work) -> float:
    """Multiplications of a token's queries with keys, and of weights with values."""
    head_dim = config.head_dim or config.hidden_size // config.num_heads
    return 2 * work.context * config.num_heads * head_dim


def _adapters(config: BackboneConfig, lora: LoraConfig | None) -> int:
    """Multiplications of a token with a layer's adapters."""
    if lora is None:
        return 0
    shapes = linear_shapes(config)
    return lora.rank * sum(sum(shapes[name]) for name in lora.target_modules)
