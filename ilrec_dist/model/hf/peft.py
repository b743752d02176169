"""LoRA adapters as PEFT folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.model.config import LoraConfig, TargetModule
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import (
    gather_rows_to_first,
    gather_to_first,
)
from ilrec_dist.model.hf.tensor_files import TensorReader
from ilrec_dist.model.lora import Lora, LoraLinear, add_lora
from ilrec_dist.model.trained_rows import EMBEDDING, HEAD

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The modules of the vocabulary tables in the checkpoint.
TABLES = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}

# Keys of adapter_config.json that change the computation, with what they must be where present.
REQUIRED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
}


def read_lora_config(folder: str | Path) -> LoraConfig:
    """The adapters' sizes and targets; UserError names a key that is not supported."""
    path = Path(folder) / CONFIG_FILE
    tree = read_json_object(path)
    for key, value in REQUIRED.items():
        if (tree.get(key) or value) != value:
            raise UserError(f"{path}: {key} {tree[key]!r} is not supported; expected {value!r}")
    targets = tree.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise UserError(f"{path}: target_modules {targets!r} is not a list of module names")
    try:
        return LoraConfig(
            rank=int(tree["r"]),
            alpha=float(tree["lora_alpha"]),
            target_modules=cast(list[TargetModule], sorted(targets)),
            dropout=float(tree.get("lora_dropout", 0.0)),
        )
    except KeyError as missing:
        raise UserError(f"{path}: the key {missing} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: r, lora_alpha or lora_dropout is not a number ({error})"
        ) from None


@torch.no_grad()
def load_adapter(backbone: Backbone, folder: str | Path) -> Lora:
    """Attach the adapters of a PEFT folder; every rank reads its own slices.

    UserError names a tensor that is missing, left over or of another shape: an adapter
    for another base.
    """
    config = read_lora_config(folder)
    reader = TensorReader(Path(folder), WEIGHTS_FILE)
    adapters = add_lora(backbone, config)
    expected = adapter_shapes(adapters)
    for name in sorted(expected.keys() | reader.entries.keys()):
        if name not in expected:
            raise UserError(
                f"{Path(folder) / WEIGHTS_FILE}: tensor {name!r} does not belong to this base; "
                "is it an adapter for another one?"
            )
        if reader.entry(name).shape != expected[name]:
            raise UserError(
                f"{Path(folder) / WEIGHTS_FILE}: tensor {name!r} has shape "
                f"{reader.entry(name).shape}, expected {expected[name]}; is it an adapter for "
                "another base?"
            )
    read_adapter(adapters, reader)
    return adapters


def adapter_shapes(adapters: Lora) -> dict[str, list[int]]:
    """The full shapes of the adapters' tensors, by their names in PEFT's files."""
    shapes: dict[str, list[int]] = {}
    for layer in adapters.linears():
        for part, module in layer.targeted():
            rows, columns = layer.shapes[part]
            shapes[tensor_name(module, "A")] = [adapters.config.rank, columns]
            shapes[tensor_name(module, "B")] = [rows, adapters.config.rank]
    return shapes


@torch.no_grad()
def read_adapter(adapters: Lora, reader: TensorReader) -> None:
    """Fill the adapters with their tensors, of which every rank takes its own part."""
    for layer in adapters.linears():
        for part, module in layer.targeted():
            a = reader.read(tensor_name(module, "A"), 0, 0, adapters.config.rank)
            b = reader.read(tensor_name(module, "B"), 0, 0, layer.shapes[part][0])
            layer.parameter_a(module).copy_(layer.local_a(a))
            layer.parameter_b(module).copy_(layer.local_b(part, b))


def adapter_tensors(adapters: Lora) -> dict[str, Tensor]:
    """The whole adapters on the CPU, by PEFT's
    names; empty but on the tp group's first rank.

    A collective over the tensor-parallel group.
    """
    tensors: dict[str, Tensor] = {}
    for layer in adapters.linears():
        for part, module in layer.targeted():
            tensors |= _full_adapter(layer, part, module)
    return tensors


def added_row_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The rows of added tokens of each vocabulary table, whole on the CPU.

    Empty but on the tp group's first rank. A collective over the tensor-parallel group.
    """
    backbone.write_trained_rows()
    group, tensors = backbone.tp_group, {}
    spans = [local_added_rows(backbone, rank) for rank in range(group.size())]
    counts = [stop - start for start, stop in spans]
    low, high = spans[group.rank()]
    if sum(counts):
        for name, table in backbone.vocabulary_tables.items():
            rows = gather_rows_to_first(table.detach()[low:high], counts, group)
            tensors[name] = rows.cpu().clone()
    return tensors if group.rank() == 0 else {}


def local_added_rows(backbone: Backbone, rank: int) -> tuple[int, int]:
    """The range of the added tokens' rows in a rank's vocabulary tables."""
    size = backbone.vocab_range[1] - backbone.vocab_range[0]
    start, stop = (edge - rank * size for edge in backbone.added_rows)
    return min(max(start, 0), size), min(max(stop, 0), size)


def _full_adapter(layer: LoraLinear, part: int, module: str) -> dict[str, Tensor]:
    """A and B of one module, on the group's first rank only; a collective."""
    a, b = layer.parameter_a(module).detach(), layer.parameter_b(module).detach()
    if layer.is_row_parallel:
        shards = gather_to_first(a.contiguous(), layer.group)
        full_a, full_b = torch.cat(shards, dim=1) if shards else a, b
    else:
        counts = [
            sum(s.stop - s.start for s in slices if s.tensor == part) for slices in layer.slices
        ]
        full_a, full_b = a, gather_rows_to_first(b, counts, layer.group)
    if layer.group.rank() != 0:
        return {}
    return {
        tensor_name(module, "A"): full_a.cpu().contiguous().clone(),
        tensor_name(module, "B"): full_b.cpu().contiguous().clone(),
    }


def tensor_name(module: str, factor: str) -> str:
    """PEFT's name of a module's A or B, by the module's name in the checkpoint."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def adapter_config(backbone: Backbone, base: str) -> dict[str, Any]:
    """adapter_config.json of a backbone's adapters and rows of added tokens."""
    assert isinstance(backbone.lora, Lora)
    lora = backbone.lora.config
    tree: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if backbone.added_rows[0] < backbone.added_rows[1]:
        indices = list(range(*backbone.added_rows))
        tree["trainable_token_indices"] = {
            TABLES[name].split(".")[-1]: indices for name in backbone.vocabulary_tables
        }
    return tree
