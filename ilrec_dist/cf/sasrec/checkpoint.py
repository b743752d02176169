"""The CF folder: models, folds, what is made for one catalogue, and manifests.

A manifest holds the SHA-256 of every file; each file is checked where it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, sha256_file
from ilrec_dist.common.manifest import MANIFEST, check_hashes, write_manifest
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset

# Raise it when files or training change: an interrupted stage goes on with models of the same
# version only.
FORMAT_VERSION = 1
# Elements of an array that are hashed, or looked through, in one step.
CHUNK_ELEMENTS = 1 << 22
# Two names of a model's state.
TABLE, KNOWN = "items.weight", "known"


def save_model(path: Path, model: SASRec) -> None:
    """Write a model as one safetensors file.

    Of a sharded table every process writes the rows of its shard, and rank 0 everything
    else.
    """
    shard = model.items.shard
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    table = state.pop(TABLE)
    # `known` stands last: its bytes would leave what follows unaligned.
    state[KNOWN] = state.pop(KNOWN)
    header, size = _header(
        {TABLE: (shard.num_items, table.shape[1])}
        | {name: tuple(value.shape) for name, value in state.items()}
    )
    row_bytes = table.shape[1] * 4
    if shard.is_rank0:
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
            file.seek(len(header) + shard.num_items * row_bytes)
            for value in state.values():
                file.write(value.numpy().data)
    shard.barrier()
    # Opened for writing only: a network file system would otherwise write whole pages, with
    # other shards' rows in them.
    with open(os.open(path, os.O_WRONLY), "wb") as file:
        file.seek(len(header) + shard.start * row_bytes)
        file.write(table.numpy().data)
    shard.barrier()


def _header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of a safetensors file of these tensors, and how many bytes
    follow it.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * (1 if name == KNOWN else 4)
        entries[name] = {
            "dtype": "BOOL" if name == KNOWN else "F32",
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def write_cf_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Write `entries` and the SHA-256 of every file of the folder; to be called last.

    In the CF folder before `write_code_order`,
    whose files have a manifest of their own.
    """
    write_manifest(folder, {"version": FORMAT_VERSION, **entries})


def models_manifest(config: CFConfig, dataset: InteractionDataset) -> dict[str, Any]:
    """The entries of the manifest of trained models."""
    return {
        "config": config_to_dict(config),
        "items": dataset.num_items,
        "data": data_hash(dataset),
    }


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of trained models.

    Raises UserError when the folder is not a finished CF folder of this version.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: not a CF folder (no {MANIFEST}); run `ilrec cf` first")
    return _read_manifest(path, {"config": dict, "items": int, "data": str})


def read_code_order(folder: str | Path) -> dict[str, Any]:
    """The manifest of what `write_code_order` wrote into a CF folder.

    Raises UserError when there is none, or it was made of other models than the CF
    folder's.
    """
    path = Path(folder) / CODE_ORDER / MANIFEST
    if not path.exists():
        raise UserError(
            f"{folder}: made for no catalogue yet (no {CODE_ORDER}/{MANIFEST}); "
            "run `ilrec cf` and `ilrec index` first"
        )
    entries = {"catalogue": str, "models": str, "index": str, "shards": int}
    manifest = _read_manifest(path, entries)
    if manifest["models"] != sha256_file(Path(folder) / MANIFEST):
        raise UserError(
            f"{path}: made of other models (the hash of the CF folder's {MANIFEST} differs); "
            "run `ilrec cf` again"
        )
    return manifest


def _read_manifest(path: Path, entries: dict[str, type]) -> dict[str, Any]:
    repair = f"delete {path.parent} and run `ilrec cf` again"
    manifest = read_json_object(path, repair)
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: version {manifest.get('version')!r}, expected {FORMAT_VERSION}; {repair}"
        )
    for key, kind in (entries | {"files": dict}).items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"{path}: damaged (no usable {key!r} in it); {repair}")
    return manifest


def checked_files(folder: str | Path, names: Iterable[str], manifest: dict[str, Any]) -> None:
    """Compare files of the folder with their SHA-256 in its manifest.

    In parallel, and once a process as long as they do not change.
    Raises UserError naming the first one that is missing or differs.
    """
    expected = {name: manifest["files"].get(name, {}).get("sha256") for name in names}
    repair = f"delete {folder} and run `ilrec cf` again"
    check_hashes(folder, expected, MANIFEST, repair)


def checked_file(folder: str | Path, name: str) -> Path:
    """The path of one file of a CF folder, after `checked_files`."""
    checked_files(folder, [name], read_manifest(folder))
    return Path(folder) / name


def load_cf(folder: str | Path, name: str = "full", table: bool = True) -> SASRec:
    """A trained model in eval mode: "full", or "fold0", "fold1", …

    The item table is mapped, not read into memory. With table=False it and `known` are
    left out, for callers that keep the vectors elsewhere. Raises UserError when the
    model is missing or damaged, or holds numbers that are not finite.
    """
    manifest = read_manifest(folder)
    path = Path(folder) / f"{name}.safetensors"
    checked_files(folder, [path.name], manifest)
    try:
        config = CFConfig(**manifest["config"])
    except (TypeError, ValueError):
        raise UserError(
            f"{Path(folder) / MANIFEST}: damaged (no usable 'config' in it); delete {folder} "
            "and run `ilrec cf` again"
        ) from None
    model = read_model(path, config, ItemShard(manifest["items"] if table else 1), table)
    for parameter in model.parameters():
        require_finite(parameter, str(path))
    return model


def read_model(path: Path, config: CFConfig, shard: ItemShard, table: bool = True) -> SASRec:
    """What `save_model` wrote, in eval mode and on the CPU; nothing is checked.

    Of the item table the rows of this process's shard, mapped. table=False as in
    `load_cf`.
    """
    # On the meta device no weights are drawn.
    with torch.device("meta"):
        model = SASRec.from_config(config, shard)
    with safe_open(path, "pt") as file:
        names = set(file.keys()) - {TABLE, KNOWN}
        state = {name: file.get_tensor(name) for name in names}
        if table:
            state[TABLE] = file.get_slice(TABLE)[shard.start : shard.stop]
            state[KNOWN] = file.get_tensor(KNOWN)
        else:
            state[TABLE] = torch.zeros(1, config.hidden_size)
            state[KNOWN] = torch.zeros(1, dtype=torch.bool)
    model.load_state_dict(state, assign=True)
    return model.eval()


def require_finite(values: torch.Tensor, path: str) -> None:
    """Raise UserError, naming the file, where a number of the tensor is not finite.

    Chunks are summed in fp32: a sum of finite numbers is finite unless they are
    useless.
    """
    flat = values.detach().reshape(-1)
    for start in range(0, len(flat), CHUNK_ELEMENTS):
        total = float(flat[start : start + CHUNK_ELEMENTS].sum(dtype=torch.float32))
        if not math.isfinite(total):
            raise UserError(
                f"{path}: holds numbers that are not finite, so the CF model has diverged; "
                "lower cf.learning_rate and run `ilrec cf` again"
            )


def load_folds(folder: str | Path) -> np.ndarray:
    """int64 [U]: the fold of each user, and with it the model that scores them."""
    folds: np.ndarray = np.load(checked_file(folder, "folds.npy")).astype(np.int64)
    return folds


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report that `train_cf` returned."""
    return read_json_object(checked_file(folder, "report.json"))


def item_vectors(cf_folder: str | Path) -> np.ndarray:
    """The full model's item table, fp32 [num_items, d], in the order of item indices.

    `cf_folder` is the folder `cf` of a run. Mapped, not read into memory. The residual
    quantisation of CF embeddings reads it. Raises UserError when the file is missing or
    damaged, or holds numbers that are not finite.
    """
    path = checked_file(cf_folder, "full.safetensors")
    with safe_open(path, "pt") as file:
        table = file.get_tensor(TABLE)
    require_finite(table, str(path))
    vectors: np.ndarray = table.numpy()
    return vectors


def data_hash(dataset: InteractionDataset) -> str:
    """SHA-256 of all interactions and of which of them are training.

    It covers what the models are trained on, which `data.both_directions` derives from
    the files of the data.
    """
    digest = hashlib.sha256()
    arrays = [(dataset.items, "<i4"), (dataset.offsets, "<i8")]
    if dataset.split_positions is not None:
        arrays.append((dataset.split_positions.ravel(), "<i4"))
    for array, dtype in arrays:
        digest.update(f"{len(array)} ".encode())
        # In chunks, so that the files stay mapped.
        for start in range(0, len(array), CHUNK_ELEMENTS):
            chunk = array[start : start + CHUNK_ELEMENTS]
            digest.update(np.ascontiguousarray(chunk, dtype=dtype).data)
    return digest.hexdigest()
