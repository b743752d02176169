"""The weights files of a training: written with
their SHA-256, checked against it when read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import atomic_file, read_json_object, sha256_file
from ilrec_dist.common.manifest import check_hashes
from ilrec_dist.common.run_layout import BASE_SHA256, RESULT, WEIGHTS_SHA256
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.partial import load_partial, partial_state_dict


def save_training_weights(backbone: Backbone, path: Path) -> str:
    """Write what was trained, unsharded, as one
    safetensors file; collective over all ranks.

    That is all weights, or what `train_partially` attached and the rows
    of added tokens. Returns the file's SHA-256 on rank 0, where it is
    written, and "" elsewhere. The file appears whole or not at all.
    """
    is_partial = backbone.base_sha256 is not None
    state = partial_state_dict(backbone) if is_partial else backbone.full_state_dict()
    sha256 = ""
    if dist.get_rank() == 0:
        with atomic_file(path) as staged:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, staged)
            sha256 = sha256_file(staged)
    dist.barrier()
    return sha256


def read_training_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a finished training's weights file, on the CPU.

    Raises UserError naming the file when it is missing or is not
    the one whose SHA-256 stands in the result.json beside it, and
    where a number is not finite.
    """
    _check_file(path)
    tensors = load_file(path)
    _require_finite(tensors, path)
    return tensors


def load_training_weights(backbone: Backbone, path: Path) -> Backbone:
    """Load a finished training's weights file under any tp; the backbone in eval mode.

    Raises UserError as `read_training_weights` does, naming a
    tensor that is missing, left over or of another shape, and where
    a partial training began with other weights than the backbone's.
    """
    if backbone.base_sha256 is None:
        backbone.load_full_state_dict(read_training_weights(path))
        return backbone.eval()
    model = _check_file(path)["model"]
    if model[BASE_SHA256] != backbone.base_sha256:
        raise UserError(
            f"{path}: trained on a model whose weights have the SHA-256 {model[BASE_SHA256]}, and "
            f"those in backbone.from have {backbone.base_sha256}; restore that model"
        )
    load_partial(backbone, path)
    _require_finite(load_file(path), path)
    return backbone.eval()


def _require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        # NaN is the smallest and the largest number of whatever holds one.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(
                f"{path}: tensor {name!r} holds numbers that are not finite (NaN or infinite), so "
                "its training has diverged; lower train.learning_rate or lengthen train.warmup, "
                "and train again"
            )


def _check_file(path: Path) -> dict[str, Any]:
    """The result.json beside a weights file, whose hash it has."""
    repair = f"restore it, or delete {path.parent} and run `ilrec run` again"
    result = read_json_object(path.with_name(RESULT), repair)
    hashes = result.get(WEIGHTS_SHA256, {})
    check_hashes(path.parent, {path.name: hashes.get(path.name)}, RESULT, repair)
    return result
