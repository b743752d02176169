"""From configuration and files to a backbone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

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


def load_trained_weights(backbone: Backbone, path: Path) -> Backbone:
    """Load what a training wrote under any tp; returns the backbone in eval mode.

    UserError names a tensor that is missing, left over or of the wrong shape.
    """
    backbone.load_full_state_dict(load_file(path))
    return backbone.eval()
