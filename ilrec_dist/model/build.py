"""From the configuration to a backbone."""

from __future__ import annotations

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.layers import Precision


def max_positions(max_history: int, depth: int) -> int:
    """Tokens of the longest input: max_history items and the generated item.

    The generated item's last token is never an input.
    """
    return (max_history + 1) * depth - 1


def build_backbone(
    config: BackboneConfig, vocab_size: int, positions: int, precision: Precision, seed: int
) -> Backbone:
    """A freshly initialised backbone, cut over the current tensor-parallel group.

    vocab_size is the unpadded size; positions the length of the learned position table.
    """
    return Backbone(config, vocab_size, positions, precision, seed)
