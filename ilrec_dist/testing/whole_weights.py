"""A training's weights as whole tensors, to compare those of different layouts."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ilrec_dist.model.weight_layout import StoredWeights


def whole_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of weights, whatever tp has written it.

    The hashes are not compared, and the whole model is in memory.
    """
    stored = StoredWeights.open(folder)
    files = {name: load_file(folder / name) for name in set(stored.files.values())}
    whole = {}
    for name, tensor in stored.tensors.items():
        places = [stored.piece(name, number) for number in range(tensor.pieces(stored.tp))]
        # Copies: what is loaded maps the file.
        pieces = [files[file][key].clone() for key, file in places]
        whole[name] = pieces[0] if tensor.spec is None else tensor.spec.join(pieces)
    return whole
