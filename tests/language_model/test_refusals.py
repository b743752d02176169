"""What cannot be trained is refused in one line, before a worker starts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ilrec_dist.cli import main
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import sha256_file
from ilrec_dist.config.load import dump_config, load_config
from ilrec_dist.config.tree import ConfigError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.language_model import LanguageModel
from ilrec_dist.model.hf.hub import is_hub_id
from ilrec_dist.model.hf.source import model_folder, vocabulary_files, weight_files
from ilrec_dist.pipeline.artifacts import item_titles
from ilrec_dist.pipeline.execute import execute
from tests.support.language_models import make_language_model, model_config

TITLES = ["red lamp", "blue lamp", "green chair"]


def test_the_key_is_from_in_yaml_on_the_command_line_and_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("backbone: {from: somewhere, new_tokens: text}\n")
    config = load_config(path)
    assert (config.backbone.from_, config.backbone.new_tokens) == ("somewhere", "text")
    assert yaml.safe_load(dump_config(config))["backbone"]["from"] == "somewhere"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    path.write_text("{}\n")
    assert load_config(path, ["backbone.from=here"]).backbone.from_ == "here"
    for override, message in (
        ("backbone.from_=here", "unknown key 'backbone.from_'; the nearest key is 'backbone.from'"),
        ("backbone.fro=here", "the nearest key is 'backbone.from'"),
        ("backbone.from=3", "key 'backbone.from': input should be a valid string, found 3"),
        ("backbone.new_tokens=text", "key 'backbone.new_tokens': has no effect here"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, [override])


@pytest.mark.parametrize(
    "override",
    ["dropout=0.2", "num_layers=2", "hidden_size=64", "rope_theta=5.0", "position_embedding=rope"],
)
def test_keys_that_the_model_decides_are_refused(override: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("backbone: {from: somewhere}\n")
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"'backbone.{key}': has no effect .* backbone.from null"):
        load_config(tmp_path / "c.yaml", [f"backbone.{override}"])


def test_the_layout_is_checked_against_the_model(tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "llama", TITLES)
    (tmp_path / "c.yaml").write_text(
        f"backbone: {{from: {model}}}\ntrain: {{batch_size: 12}}\nlaunch: {{workers: 12}}\n"
    )

    def load(*overrides: str) -> None:
        load_config(tmp_path / "c.yaml", overrides)

    # Two key/value heads on four ranks are shared by two each.
    load("launch.tp=4")
    with pytest.raises(ConfigError, match="'launch.tp': tp 3 does not divide .* 4 attention heads"):
        load("launch.tp=3", "backbone.vocab_multiple=12")
    with pytest.raises(ConfigError, match="vocab_multiple 8"):
        load("launch.tp=3", "backbone.vocab_multiple=8")
    with pytest.raises(ConfigError, match="below the 3 layers"):
        load("objective.num_intermediate_layers=3")
    with pytest.raises(ConfigError, match="'items.title_vocab_size': .* backbone.from .* null"):
        load("items.form=titles", "train.targets=last", "items.title_vocab_size=600")
    with pytest.raises(ConfigError, match="'backbone.new_tokens': .* items.form semantic"):
        load("items.form=titles", "train.targets=last", "backbone.new_tokens=text")
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(tree | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="config.json: model_type 'mamba' is not supported"):
        load()


def test_the_path_of_nothing_is_taken_for_no_hub_id(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for source in (
        f"{tmp_path}/llama",
        "./llama",
        "../llama",
        "~/llama",
        "a/b/c",
        "models/llama",
        "llama/",
        "llama.gguf",
    ):
        assert not is_hub_id(source)
        with pytest.raises(
            UserError, match=f"'{re.escape(source)}' is no local .* name the folder"
        ):
            weight_files(source)
    assert is_hub_id("other/llama")


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="config.json: no such file"):
        vocabulary_files(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer"):
        vocabulary_files(str(folder))
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        weight_files(str(folder))
    with pytest.raises(UserError, match="no GGUF file"):
        model_folder(str(folder / "config.json"), tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, folder / "model-1.safetensors")
    names = [path.name for path in weight_files(str(folder))]
    assert names == ["config.json", "model.safetensors.index.json", "model-1.safetensors"]


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "llama", TITLES)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<item_1>"])
    tokenizer.save_pretrained(model)
    items = np.arange(3, dtype=np.int32)
    shop = InteractionDataset(items, np.array([0, 3]), ["u"], ["a", "b", "c"], titles=TITLES)

    def build(folder: Path, rows: int) -> None:
        config = ItemsConfig(form="atomic")
        build_catalogue(config, shop, tmp_path / "items", None, LanguageModel(folder, rows))

    with pytest.raises(UserError, match="the token '<item_1>' already"):
        build(model, 500)
    model = make_language_model(tmp_path / "other", TITLES)
    with pytest.raises(UserError, match="largest id .* 100 embedding rows"):
        build(model, 100)
    # Spare rows are few, and the model's own special tokens are among the tokenizer's.
    with pytest.raises(UserError, match="largest id .* 900 embedding rows"):
        build(model, 900)
    path = model / "config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"eos_token_id": [0, 399]}))
    with pytest.raises(UserError, match="eos_token_id of config.json is 399, .* largest id"):
        build(model, 400)
    path.write_text(json.dumps(tree))
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="does not load"):
        build(model, 500)
    assert not (tmp_path / "items").exists()


def test_a_training_that_cannot_begin_starts_no_worker(tmp_path: Path, capsys) -> None:
    model = make_language_model(tmp_path / "llama", TITLES)
    config = model_config(tmp_path, model, train={"max_history": 64, "methods": ["sft"]})
    execute(config, "prepare")
    execute(config, "index")
    refused = "129 tokens, .* 128 positions; lower train.max_history"
    with pytest.raises(UserError, match=refused):
        execute(config, "train")
    # Nor is a CF model trained for it.
    rewarded = model_config(tmp_path, model, train={"max_history": 64, "methods": ["ilrec"]})
    capsys.readouterr()
    with pytest.raises(UserError, match=refused):
        execute(rewarded, "run")
    said = capsys.readouterr().out
    assert "index: unchanged" in said and "cf" not in said
    assert not (rewarded.run_dir / "cf").exists()
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight' is missing"):
        execute(model_config(tmp_path, model, train={"methods": ["ilrec"]}), "run")
    assert not (rewarded.run_dir / "cf").exists()

    class Untitled:
        dataset = dataclasses.make_dataclass("Data", ["titles"])(None)

    with pytest.raises(UserError, match="new_tokens: text needs the items' titles"):
        item_titles(Untitled())  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["truncated", "header", "of the index"])
def test_weights_that_are_not_whole_are_refused_before_any_stage(
    how: str, tmp_path: Path, capsys
) -> None:
    model = make_language_model(tmp_path / "llama", TITLES)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if how == "truncated":
        del content[-1:]
    elif how == "header":
        # The end of the first tensor.
        content[content.index(b"data_offsets") + len(b'data_offsets":[0,')] ^= 1
    else:
        index = {"weight_map": {"lost": weights.name}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.write_bytes(content)
    config = model_config(tmp_path / "runs", model, train={"methods": ["sft"]})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    # What making the model wrote.
    capsys.readouterr()
    assert main(["run", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    said = "'lost' is missing" if how == "of the index" else "cannot be read as safetensors"
    assert f"{weights}: {said}" in error.replace("tensor ", "") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("place", ["local-dir", "cache"])
def test_a_download_with_a_flipped_byte_is_refused(place: str, tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "llama", TITLES)
    weights, digest = model / "model.safetensors", sha256_file(model / "model.safetensors")
    if place == "local-dir":
        note = model / ".cache/huggingface/download/model.safetensors.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"commit\n{digest}\n{time.time()}\n")
    else:
        blob = tmp_path / "blobs" / digest
        blob.parent.mkdir()
        weights.rename(blob)
        weights.symlink_to(blob)
    assert weights in weight_files(str(model))
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    # Older than the download, and a time for which this process has no hash.
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns - 1))
    with pytest.raises(UserError, match=f"^{re.escape(str(weights))}: damaged .*hub.*download"):
        weight_files(str(model))
    if place == "local-dir":
        # What the user has written in its place is the user's.
        os.utime(weights, (time.time() + 60, time.time() + 60))
        assert weights in weight_files(str(model))
