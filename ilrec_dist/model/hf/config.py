"""What the config.json of a Hugging Face folder says; loads no torch and no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.hf.families import backbone_config

TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Pretrained:
    """What a checkpoint's config.json says of the backbone that holds it."""

    config: BackboneConfig
    # Rows of the embedding, which may exceed the tokenizer's size.
    vocab_size: int
    max_positions: int
    # The special tokens' ids that config.json has, under TOKEN_ID_KEYS.
    token_ids: Mapping[str, Any] = field(default_factory=dict)


def read_config(folder: str | Path) -> Pretrained:
    """The backbone of a Hugging Face folder.

    UserError names the key of config.json that is missing or that it cannot be built
    for.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder")
    tree = read_json_object(path)
    config = backbone_config(tree, path)
    sizes = {}
    for key in ("vocab_size", "max_position_embeddings"):
        if key not in tree:
            raise UserError(f"{path}: the key {key!r} is missing")
        if not isinstance(tree[key], int) or tree[key] < 1:
            raise UserError(f"{path}: {key} {tree[key]!r} is not a positive integer")
        sizes[key] = tree[key]
    token_ids = {key: tree[key] for key in TOKEN_ID_KEYS if tree.get(key) is not None}
    return Pretrained(config, sizes["vocab_size"], sizes["max_position_embeddings"], token_ids)
