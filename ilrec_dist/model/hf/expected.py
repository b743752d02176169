"""The tensors that a checkpoint must have, from its config.json; builds no decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ilrec_dist.model.config import BackboneConfig, TargetModule, linear_shapes
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.families import checkpoint_names, family_of_config
from ilrec_dist.model.hf.slices import tensor_shapes
from ilrec_dist.model.hf.tensor_files import TensorReader


def check_tensors(folder: str | Path) -> None:
    """Compare the headers of a model's safetensors with its config.json.

    UserError names the first tensor that is missing or has another shape, as
    `load_weights` would in the workers.
    """
    pretrained, reader = read_config(folder), TensorReader(Path(folder))
    config, family = pretrained.config, family_of_config(pretrained.config)
    for name, full in parameter_shapes(config, pretrained.vocab_size):
        shapes = tensor_shapes(name, full, config)
        for key, shape in zip(checkpoint_names(name, family), shapes, strict=True):
            reader.require(key, shape)


def parameter_shapes(config: BackboneConfig, vocab_rows: int) -> Iterator[tuple[str, list[int]]]:
    """Each parameter of a decoder of one of FAMILIES, with its shape over all ranks."""
    d, linear = config.hidden_size, linear_shapes(config)

    def joined(*modules: TargetModule) -> list[int]:
        return [sum(linear[module][0] for module in modules), linear[modules[0]][1]]

    joint = joined("q_proj", "k_proj", "v_proj")
    layer = {
        "input_layernorm.weight": [d],
        "self_attention.linear_qkv.weight": joint,
        "self_attention.linear_proj.weight": joined("o_proj"),
        "pre_mlp_layernorm.weight": [d],
        "mlp.linear_fc1.weight": joined("gate_proj", "up_proj"),
        "mlp.linear_fc2.weight": joined("down_proj"),
    }
    if config.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = joint[:1]
    if config.qk_norm:
        head_dim = config.head_dim or d // config.num_heads
        layer["self_attention.q_layernorm.weight"] = [head_dim]
        layer["self_attention.k_layernorm.weight"] = [head_dim]
    yield "embedding.word_embeddings.weight", [vocab_rows, d]
    for number in range(config.num_layers):
        for name, shape in layer.items():
            yield f"decoder.layers.{number}.{name}", shape
    yield "decoder.final_layernorm.weight", [d]
    if not config.tie_embeddings:
        yield "output_layer.weight", [vocab_rows, d]
