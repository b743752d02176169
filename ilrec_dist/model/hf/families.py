"""The Hugging Face families that the decoder can be: one entry of FAMILIES each.

An entry maps config.json to BackboneConfig and the decoder's tensors to the
checkpoint's, so that a family of the same architecture is one entry and no other code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ilrec_dist.common.config_fields import section_from_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.model.config import BackboneConfig

# BackboneConfig's field → the key of config.json.
CONFIG_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}

# The decoder's tensor → the checkpoint's, in the order in which they are joined. Names under
# `decoder.layers.N.` stand without that prefix, and end in .weight or .bias on both sides.
TENSORS = {
    "embedding.word_embeddings": ("model.embed_tokens",),
    "output_layer": ("lm_head",),
    "decoder.final_layernorm": ("model.norm",),
    "input_layernorm": ("input_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}

# What every family here has in common.
DECODER: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "bias": False,
    "dropout": 0.0,
}

# Keys whose value is taken where config.json lacks them, as `transformers` does.
DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.02}

# Keys that change the computation: config.json lacks them or has this value.
REQUIRED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "quantization_config": None,
}

# The only scaling of rotary frequencies besides none (Llama 3): what must stand beside `factor`.
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Family:
    """One model type of `transformers`."""

    model_type: str
    architecture: str
    # Fields of BackboneConfig that tell this family from the others.
    features: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: DEFAULTS)
    required: Mapping[str, Any] = field(default_factory=lambda: REQUIRED)
    config_keys: Mapping[str, str] = field(default_factory=lambda: CONFIG_KEYS)
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TENSORS)


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            defaults=DEFAULTS | {"num_key_value_heads": None, "head_dim": None},
        ),
        Family("qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}, DEFAULTS | {"head_dim": None}),
        Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, DEFAULTS | {"head_dim": 128}),
    )
}


def family_of_json(tree: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json; UserError names the key that is not supported."""
    model_type = tree.get("model_type")
    if model_type is None:
        raise UserError(f"{path}: no model_type; expected the config.json of a Hugging Face model")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(
            f"{path}: model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    for key, value in family.required.items():
        if tree.get(key, value) != value:
            raise UserError(f"{path}: {key} {tree[key]!r} is not supported; expected {value!r}")
    kinds = set(tree.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise UserError(
            f"{path}: layer_types {sorted(map(str, kinds))} are not supported; expected "
            "full_attention in every layer"
        )
    return family


def backbone_config(tree: Mapping[str, Any], path: Path) -> BackboneConfig:
    """The decoder of a config.json; UserError names the key that does not fit."""
    family = family_of_json(tree, path)
    theta, scaling = _rope(tree, path)
    values: dict[str, Any] = {}
    for name, key in family.config_keys.items():
        if key in tree:
            values[name] = tree[key]
        elif key in family.defaults:
            values[name] = family.defaults[key]
        else:
            raise UserError(f"{path}: the key {key!r} is missing")
    values |= DECODER | dict(family.features)
    values |= {"rope_theta": theta, "rope_scaling_factor": scaling}
    try:
        return section_from_dict(BackboneConfig, values)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error, family)}") from None


def _first_problem(error: ValidationError, family: Family) -> str:
    """A pydantic error as one line that names the key of config.json."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    return f"{family.config_keys.get(name, name)} {problem['input']!r}: {problem['msg']}"


def family_of_config(config: BackboneConfig, model_type: str | None = None) -> Family:
    """The family of a decoder; UserError when it has no Hugging Face form.

    model_type: the family of the checkpoint that the decoder was read from, if any.
    """
    if model_type is not None:
        return FAMILIES[model_type]
    features = {name for family in FAMILIES.values() for name in family.features}
    for family in FAMILIES.values():
        wanted = DECODER | dict.fromkeys(features, False) | dict(family.features)
        # Only training has dropout.
        del wanted["dropout"]
        if all(getattr(config, name) == value for name, value in wanted.items()):
            return family
    shared = ", ".join(f"{key}={value}" for key, value in DECODER.items() if key != "dropout")
    raise UserError(
        f"this backbone has no Hugging Face form ({', '.join(FAMILIES)}), which needs {shared} "
        f"and at most one of {', '.join(sorted(features))}"
    )


def config_json(
    config: BackboneConfig, family: Family, vocab_size: int, max_positions: int
) -> dict[str, Any]:
    """The config.json of a decoder, for transformers 4 and 5; no dtype, no
    token ids.
    """
    resolved = {item.name: getattr(config, item.name) for item in fields(config)}
    resolved["num_kv_heads"] = config.num_kv_heads or config.num_heads
    resolved["ffn_hidden_size"] = config.ffn_hidden_size or 4 * config.hidden_size
    resolved["head_dim"] = config.head_dim or config.hidden_size // config.num_heads
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": config.rope_scaling_factor, **LLAMA3_SCALING}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        **{key: resolved[name] for name, key in family.config_keys.items()},
        "hidden_act": "silu",
        # transformers 4 reads these two keys, 5 reads rope_parameters.
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling_factor is not None else None,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def checkpoint_names(name: str, family: Family) -> list[str]:
    """The checkpoint's tensors that make up a parameter, in their order."""
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("decoder.layers."):
        number, module = module.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"model.layers.{number}."
    return [f"{prefix}{part}.{kind}" for part in family.tensors[module]]


def _rope(tree: Mapping[str, Any], path: Path) -> tuple[float, float | None]:
    """(theta, factor of Llama 3's scaling or None), from either place for them."""
    rope = tree.get("rope_parameters") or tree.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    expected = "expected rope_type default, or llama3 with " + ", ".join(
        f"{key} {value:g}" for key, value in LLAMA3_SCALING.items()
    )
    partial = rope.get("partial_rotary_factor", tree.get("partial_rotary_factor", 1.0))
    scaled = kind == "llama3" and all(rope.get(k) == v for k, v in LLAMA3_SCALING.items())
    if (kind != "default" and not scaled) or partial != 1.0:
        raise UserError(f"{path}: rope parameters {dict(rope)!r} are not supported; {expected}")
    try:
        theta = float(rope.get("rope_theta", tree.get("rope_theta", 10000.0)))
        return theta, float(rope["factor"]) if scaled else None
    except KeyError as missing:
        raise UserError(f"{path}: the key {missing} of the rope parameters is missing") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: rope parameters {dict(rope)!r} are not numbers") from None
