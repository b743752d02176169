"""Hugging Face weights in and out: dense Llama, Qwen2 and Qwen3 checkpoints (config.json + safetensors) ⇄ the backbone, under any tp."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ilrec_dist.common.errors import UserError
from ilrec_dist.model import sharding as weights
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone

FAMILIES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Pretrained:
    """What a checkpoint's config.json says of the backbone that holds it."""

    config: BackboneConfig
    vocab_size: int
    max_positions: int


def read_config(folder: str | Path) -> Pretrained:
    """The backbone of a Hugging Face folder. UserError names the key of config.json that it cannot be built for."""
    path = Path(folder) / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        family = given["model_type"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not the configuration of a Hugging Face model (malformed JSON or no model_type)"
        ) from None
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    for key, wanted in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("hidden_act", "silu"),
    ):
        if given.get(key, wanted) != wanted:
            raise UserError(f"{path}: {key} {given[key]!r} is not supported; expected {wanted!r}")
    try:
        theta, scaling = _rope(given, path)
        config = BackboneConfig(
            num_layers=given["num_hidden_layers"],
            hidden_size=given["hidden_size"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given.get("num_key_value_heads") or given["num_attention_heads"],
            ffn_hidden_size=given["intermediate_size"],
            head_dim=given.get("head_dim"),
            normalization="RMSNorm",
            norm_epsilon=given["rms_norm_eps"],
            activation="swiglu",
            position_embedding="rope",
            rope_theta=theta,
            rope_scaling_factor=scaling,
            bias=False,
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            dropout=0.0,
            tie_embeddings=given.get("tie_word_embeddings", False),
            init_std=given.get("initializer_range", 0.02),
        )
        return Pretrained(config, given["vocab_size"], given["max_position_embeddings"])
    except KeyError as missing:
        raise UserError(f"{path}: key {missing} is missing") from None


def load_weights(backbone: Backbone, folder: str | Path) -> None:
    """Fill the backbone from a folder whose read_config gave its configuration; every rank reads the files, tensor by tensor.

    Vocabulary rows beyond the file's (new item tokens, padding) keep their seeded initialisation. UserError names the file and tensor that is
    missing, damaged or of another shape.
    """
    files = _TensorFiles(Path(folder))
    tp, rank = backbone.tp_group.size(), backbone.tp_group.rank()
    with torch.no_grad():
        for name, parameter in backbone.gpt.named_parameters():
            cut = weights.shard_spec(name, backbone.config)
            shape = weights.full_shape(parameter.shape, cut, tp)
            full = _import(name, backbone.config, files.read)
            if (
                _is_vocabulary(name)
                and full.shape[0] <= shape[0]
                and full.shape[1:] == parameter.shape[1:]
            ):
                start = backbone.vocab_range[0]
                mine = full[start : start + len(parameter)]
                parameter[: len(mine)].copy_(mine)
            elif list(full.shape) == shape:
                parameter.copy_(full if cut is None else cut.slice(full, rank, tp))
            else:
                raise UserError(
                    f"{folder}: the tensors of {name!r} have shape {list(full.shape)}, expected {shape}; is it the folder of this configuration?"
                )


def save_weights(
    backbone: Backbone, folder: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a folder that `transformers` loads: config.json and safetensors in `dtype`, vocabulary unpadded. A collective; rank 0 writes.

    `folder` must not exist; it appears whole or not at all. UserError when no supported family has this architecture. A backbone without
    learned positions is written with max_position_embeddings = max_positions.
    """
    family = family_of(backbone.config)
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: already exists; choose a folder to create")
    tensors: dict[str, Tensor] = {}
    for name, parameter in backbone.gpt.named_parameters():
        full = weights.gather(
            parameter, weights.shard_spec(name, backbone.config), backbone.tp_group
        )
        if dist.get_rank() == 0:
            full = full[: backbone.vocab_size] if _is_vocabulary(name) else full
            tensors.update(
                {
                    key: tensor.to(dtype, copy=True).contiguous()
                    for key, tensor in _export(name, full, backbone.config).items()
                }
            )
    if dist.get_rank() == 0:
        _write(folder, tensors, _config_json(backbone, family, dtype))
    dist.barrier()


def family_of(config: BackboneConfig) -> str:
    """The Hugging Face model type of this architecture; UserError when there is none among the supported."""
    norm_rope_swiglu = (config.normalization, config.position_embedding, config.activation) == (
        "RMSNorm",
        "rope",
        "swiglu",
    )
    if not norm_rope_swiglu or config.bias or (config.qk_norm and config.qkv_bias):
        raise UserError(
            "only a backbone with normalization=RMSNorm, activation=swiglu, position_embedding=rope, bias=false and at most one of qkv_bias and"
            " qk_norm has a Hugging Face form (llama, qwen2, qwen3)"
        )
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def _rope(given: dict[str, Any], path: Path) -> tuple[float, float | None]:
    """(theta, Llama-3 scaling factor or None), from either of the two places where transformers has kept them."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    llama3 = (
        rope.get("low_freq_factor"),
        rope.get("high_freq_factor"),
        rope.get("original_max_position_embeddings"),
    )
    if kind != "llama3" or llama3 != (1.0, 4.0, 8192):
        raise UserError(
            f"{path}: rope scaling {rope!r} is not supported; expected rope_type default, or llama3 with factors 1 and 4 and 8192 positions"
        )
    return float(theta), float(rope["factor"])


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


# Where one tensor here is one tensor there.
_SAME = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def _names(name: str) -> list[str]:
    """The Hugging Face tensors that make up one of ours, in the order in which they are joined."""
    if name in _SAME:
        return [_SAME[name]]
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    layer = f"model.layers.{number}."
    if rest in _SAME:
        return [layer + _SAME[rest]]
    module, kind = rest.rsplit(".", 1)
    if module == "self_attention.linear_qkv":
        return [f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv"]
    assert module == "mlp.linear_fc1", name
    return [f"{layer}mlp.gate_proj.{kind}", f"{layer}mlp.up_proj.{kind}"]


def _import(name: str, config: BackboneConfig, read: Callable[[str], Tensor]) -> Tensor:
    parts = [read(key) for key in _names(name)]
    if "linear_qkv" not in name:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    groups = (
        config.num_kv_heads or config.num_heads
    )  # ours: for each key/value head its query heads, its key, its value
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _export(name: str, full: Tensor, config: BackboneConfig) -> dict[str, Tensor]:
    names = _names(name)
    if "linear_qkv" not in name:
        return dict(zip(names, full.chunk(len(names)), strict=True))
    groups = config.num_kv_heads or config.num_heads
    queries = config.num_heads // groups
    by_head = full.unflatten(0, (groups, queries + 2, -1))
    parts = (by_head[:, :queries], by_head[:, queries], by_head[:, queries + 1])
    return {key: part.reshape(-1, *full.shape[1:]) for key, part in zip(names, parts, strict=True)}


class _TensorFiles:
    """The safetensors files of a folder, one or several with an index, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            self.file_of = (
                json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if index.exists()
                else {}
            )
        except (ValueError, KeyError):
            raise UserError(f"{index}: malformed; expected JSON with a weight_map") from None

    def read(self, key: str) -> Tensor:
        path = self.folder / self.file_of.get(key, "model.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                if key not in file.keys():
                    raise UserError(f"{path}: tensor {key!r} is missing")
                return file.get_tensor(key)
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; expected the safetensors of a Hugging Face model"
            ) from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


def _config_json(backbone: Backbone, family: str, dtype: torch.dtype) -> dict[str, Any]:
    config = backbone.config
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": config.rope_scaling_factor}
        rope |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[
                family
            ]
        ],
        "model_type": family,
        "vocab_size": backbone.vocab_size,
        "max_position_embeddings": backbone.max_positions,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size or 4 * config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim or config.hidden_size // config.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,  # transformers 4 reads these two, 5 reads rope_parameters
        "rope_scaling": rope if config.rope_scaling_factor is not None else None,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    from huggingface_hub import save_torch_state_dict

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir()
        save_torch_state_dict(tensors, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
