"""Models that `backbone.from` names by their id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from ilrec_dist.common.errors import UserError

# What is read of a model; neither other formats of its weights nor code.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]


def is_hub_id(source: str) -> bool:
    """Whether the name of nothing that is here has the form OWNER/NAME.

    OWNER is then no folder either.
    """
    owner, _, name = source.partition("/")
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None
    return is_id and not name.endswith(".gguf") and not Path(owner).exists()


def hub_folder(model: str) -> Path:
    """The folder of a model in the hub's cache, downloaded where it is not there.

    What is in the cache is used as it is, without a look at the network, so that a
    model does not change under a run. Raises UserError where it cannot be downloaded.
    """
    # Loaded for models of the hub alone.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=PATTERNS, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(model, allow_patterns=PATTERNS))
    except Exception as error:
        # The library raises its own errors, the system's and those of its HTTP client.
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"backbone.from: {model!r} is no local folder, and could not be downloaded from the "
            f"Hugging Face hub ({type(error).__name__}: {reason}); name a local folder, or get it "
            f"where there is a network: `hf download {model} --local-dir "
            f"models/{model.rsplit('/', 1)[-1]}`"
        ) from None
