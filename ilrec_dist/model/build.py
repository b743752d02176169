"""From the configuration to a backbone."""

from __future__ import annotations

from pathlib import Path

from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.decoder import check_positions, decoder_of
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import load_weights
from ilrec_dist.model.hf.config import Pretrained
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.layers import Precision


def build_backbone(
    config: BackboneConfig,
    vocab_size: int,
    positions: int,
    precision: Precision,
    seed: int,
    initialize: bool = True,
) -> Backbone:
    """A freshly initialised backbone, cut over the current tensor-parallel group.

    vocab_size is the unpadded size; positions the length of the learned position table.
    With initialize=False the weights are undefined until they are loaded.
    """
    return Backbone(config, vocab_size, positions, precision, seed, initialize)


def build_pretrained(
    config: BackboneConfig,
    pretrained: Pretrained,
    vocab_size: int,
    longest_input: int,
    precision: Precision,
    seed: int,
) -> Backbone:
    """The backbone of a pretrained model, its weights undefined until they are loaded.

    `config` is the section `backbone`. Raises UserError where an input of that many
    tokens exceeds the model's positions.
    """
    check_positions(pretrained, longest_input)
    return build_backbone(
        decoder_of(config, pretrained),
        vocab_size,
        pretrained.max_positions,
        precision,
        seed,
        initialize=False,
    )


def load_pretrained(
    backbone: Backbone, folder: str | Path, new_rows: NewRows | None = None
) -> None:
    """Fill what `build_pretrained` built from
    the model's folder, and draw its new rows.
    """
    load_weights(backbone, folder, new_rows)
