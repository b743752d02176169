"""The decoder that a configuration asks for, before anything of it is built."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from ilrec_dist.common.errors import UserError
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.hf.config import Pretrained, read_config


def max_positions(max_history: int, depth: int) -> int:
    """Tokens of the longest input: max_history items and the generated item.

    The generated item's last token is never an input.
    """
    return (max_history + 1) * depth - 1


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


def padded_vocab_size(config: BackboneConfig, vocab_size: int) -> int:
    """vocab_size rounded up to a multiple of config.vocab_multiple, whatever tp is."""
    return math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple
