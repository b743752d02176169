"""From the configuration to a backbone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import Pretrained, load_weights, read_config
from ilrec_dist.model.hf.new_rows import NewRows
from ilrec_dist.model.layers import Precision


def max_positions(max_history: int, depth: int) -> int:
    """Tokens of the longest input: max_history items and the generated item.

    The generated item's last token is never an input.
    """
    return (max_history + 1) * depth - 1


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


def check_positions(pretrained: Pretrained, longest_input: int) -> None:
    """Raise UserError where the longest input exceeds the model's positions."""
    if longest_input > pretrained.max_positions:
        raise UserError(
            f"train.max_history: its longest input has {longest_input} tokens, and the model in "
            f"backbone.from has {pretrained.max_positions} positions; lower train.max_history"
        )


def decoder_of(config: BackboneConfig, pretrained: Pretrained) -> BackboneConfig:
    """The section `backbone` with the sizes that
    the pretrained model's config.json decides.
    """
    return dataclasses.replace(
        pretrained.config,
        from_=config.from_,
        new_tokens=config.new_tokens,
        vocab_multiple=config.vocab_multiple,
    )


def known_decoder(config: BackboneConfig) -> BackboneConfig | None:
    """The decoder as far as the section `backbone` tells.

    None where `backbone.from` is not, or not yet, a folder with a config.json. Raises
    UserError where the config.json is of no supported model.
    """
    if config.from_ is None:
        return config
    if not (Path(config.from_) / "config.json").is_file():
        return None
    return decoder_of(config, read_config(config.from_))
