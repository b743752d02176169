"""The CF folder: models and folds, in it what is made of them for one catalogue, and the manifests of hashes that are checked before any of it is used."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.cf.sasrec.sharded_table import Split
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, sha256_file, write_json
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset

FORMAT_VERSION = 2  # raise when files or training change: models of an interrupted stage are gone on with by the same version only
HASHED_AT_ONCE = 1 << 22
TABLE, KNOWN = "items.weight", "known"  # of a model's state


def save_model(path: Path, model: SASRec) -> None:
    """Write a model as one safetensors file. Every process of a split table writes its own rows of it, and the first one everything else."""
    split, state = (
        model.items.split,
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
    )
    table = state.pop(TABLE)
    state[KNOWN] = state.pop(KNOWN)  # last: its bytes would leave what follows unaligned
    whole = {
        TABLE: (split.num_items, table.shape[1]),
        **{name: value.shape for name, value in state.items()},
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in whole.items():
        begin, end = end, end + math.prod(shape) * (1 if name == KNOWN else 4)
        header[name] = {
            "dtype": "BOOL" if name == KNOWN else "F32",
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    if split.part == 0:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(data + end)
            file.seek(data + split.num_items * table.shape[1] * 4)
            for value in state.values():
                file.write(value.numpy().data)
    split.barrier()
    with (
        open(os.open(path, os.O_WRONLY), "wb") as file
    ):  # not to be read: a network file system would write pages whole, with others' rows in them
        file.seek(data + split.start * table.shape[1] * 4)
        file.write(table.numpy().data)
    split.barrier()


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """`entries`, and every file of the folder with its SHA-256; to be called last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): sha256_file(path) for path in files}
    write_json(folder / "manifest.json", {"version": FORMAT_VERSION, **entries, "sha256": hashes})


def models_manifest(config: CFConfig, dataset: InteractionDataset) -> dict[str, Any]:
    """What the manifest of trained models says of them."""
    return {
        "config": config_to_dict(config),
        "items": dataset.num_items,
        "data": data_hash(dataset),
    }


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest. Raises UserError when the folder is not a finished CF folder of this version."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder}: not a CF folder (no manifest.json); run `ilrec cf` first")
    return _read(path)


def read_code_order(folder: str | Path) -> dict[str, Any]:
    """The manifest of what `write_code_order` wrote. Raises UserError when there is none, or it was made of other models than the CF folder's."""
    path = Path(folder) / CODE_ORDER / "manifest.json"
    if not path.exists():
        raise UserError(
            f"{folder}: made for no catalogue yet (no {CODE_ORDER}/manifest.json); run `ilrec cf` and `ilrec index` first"
        )
    manifest = _read(path)
    if manifest["models"] != sha256_file(Path(folder) / "manifest.json"):
        raise UserError(
            f"{path}: made of other models (the hash of the CF folder's manifest.json differs); run `ilrec cf` again"
        )
    return manifest


def _read(path: Path) -> dict[str, Any]:
    manifest = read_json_object(path)
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: version {manifest.get('version')!r}, expected {FORMAT_VERSION}; run `ilrec cf` again"
        )
    return manifest


def checked_file(folder: str | Path, name: str, manifest: dict[str, Any] | None = None) -> Path:
    """The path of one file of the folder, its bytes compared with the manifest. Raises UserError when it is missing or differs."""
    path = Path(folder) / name
    expected = (manifest or read_manifest(folder))["sha256"].get(name)
    if expected is None or not path.exists() or sha256_file(path) != expected:
        raise UserError(
            f"{path}: missing or damaged (its SHA-256 is not the one in manifest.json); delete {folder} and run `ilrec cf` again"
        )
    return path


def load_config(folder: str | Path) -> CFConfig:
    return CFConfig(**read_manifest(folder)["config"])


def load_cf(folder: str | Path, which: str = "full", table: bool = True) -> SASRec:
    """A trained model in eval mode: "full", or "fold0", "fold1", … Raises UserError when it is missing or damaged.

    The item table is mapped, not read. table=False leaves it and `known` out, for callers that keep the vectors elsewhere.
    """
    manifest = read_manifest(folder)
    path = checked_file(folder, f"{which}.safetensors", manifest)
    return read_model(
        path, CFConfig(**manifest["config"]), Split(manifest["items"] if table else 1), table
    )


def read_model(path: Path, config: CFConfig, split: Split, table: bool = True) -> SASRec:
    """What `save_model` wrote, in eval mode and on the CPU; of the item table the rows of this process's part, mapped. table=False as of `load_cf`."""
    with torch.device("meta"):  # nothing is drawn
        model = SASRec.from_config(config, split)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys() if name not in (TABLE, KNOWN)}  # noqa: SIM118
        if table:
            state |= {
                TABLE: file.get_slice(TABLE)[split.start : split.stop],
                KNOWN: file.get_tensor(KNOWN),
            }
        else:
            state |= {
                TABLE: torch.zeros(1, config.hidden_size),
                KNOWN: torch.zeros(1, dtype=torch.bool),
            }
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_folds(folder: str | Path) -> np.ndarray:
    """int64 [U]: the fold of each user, and with it the model that scores them."""
    return np.load(checked_file(folder, "folds.npy")).astype(np.int64)


def item_vectors(folder: str | Path) -> np.ndarray:
    """The full model's item table, fp32 [num_items, d] by item index: what residual quantisation of CF embeddings reads. Mapped, not read."""
    with safe_open(checked_file(folder, "full.safetensors"), "pt") as file:
        table: np.ndarray = file.get_tensor(TABLE).numpy()
    return table


def data_hash(dataset: InteractionDataset) -> str:
    """SHA-256 of all interactions and of what is training among them: of what was trained on, which `both_directions` makes of the data's own files."""
    digest = hashlib.sha256()
    arrays = [(dataset.items, "<i4"), (dataset.offsets, "<i8")] + (
        [] if dataset.split_positions is None else [(dataset.split_positions.ravel(), "<i4")]
    )
    for array, kind in arrays:
        digest.update(f"{len(array)} ".encode())
        for start in range(0, len(array), HASHED_AT_ONCE):  # the files stay mapped
            digest.update(
                np.ascontiguousarray(array[start : start + HASHED_AT_ONCE], dtype=kind).data
            )
    return digest.hexdigest()
