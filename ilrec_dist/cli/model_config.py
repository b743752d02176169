"""The configuration of commands that read the model of `backbone.from`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.model.hf.hub import hub_folder, is_hub_id


def load_config_and_model(path: str, overrides: Sequence[str]) -> Config:
    """`load_config`, with the folder of a model that is named by its id on the hub.

    The model is downloaded where it is not in the hub's cache. The
    configuration is checked again with the model's sizes.
    """
    config = load_config(path, overrides)
    source = config.backbone.from_
    if source is None or not is_hub_id(source):
        return config
    return load_config(path, [*overrides, f"backbone.from={json.dumps(str(hub_folder(source)))}"])
