"""Item vectors from a local model folder, against the model called by hand."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from ilrec_dist.common.errors import UserError
from ilrec_dist.items.build import build_catalogue, input_files
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.spread import Spread, Workers
from ilrec_dist.items.text_embeddings import text_vectors
from ilrec_dist.items.text_model import TextModel
from tests.support.item_words import toy

TEXTS = ["oak table", "oak", "elm chair and table", "ash"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {
        word: number
        for number, word in enumerate(
            ["[PAD]", "[UNK]", "oak", "elm", "ash", "table", "chair", "and"]
        )
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "pooling", [None, "pooling_mode_cls_token", "pooling_mode_lasttoken", "pooling_mode_max_tokens"]
)
def test_vectors_are_the_models_own_whatever_the_batch(model_folder, pooling):
    (model_folder / "1_Pooling").mkdir(exist_ok=True)
    (model_folder / "1_Pooling" / "config.json").write_text(
        json.dumps({pooling: True} if pooling else {})
    )
    model, ids = (
        BertModel.from_pretrained(model_folder).eval(),
        {"oak": 2, "elm": 3, "ash": 4, "table": 5, "chair": 6, "and": 7},
    )
    expected = []
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model(torch.tensor([[ids[word] for word in text.split()]])).last_hidden_state[
                0
            ]
        pooled = {
            None: hidden.mean(0),
            "pooling_mode_cls_token": hidden[0],
            "pooling_mode_lasttoken": hidden[-1],
            "pooling_mode_max_tokens": hidden.amax(0),
        }[pooling]
        expected.append((pooled / pooled.norm()).numpy())
    for batch in (1, 3):
        assert np.allclose(TextModel(model_folder, batch).embed(TEXTS), expected, atol=1e-5)


def test_an_index_is_built_from_them_and_the_models_files_count_as_inputs(
    model_folder, tmp_path, monkeypatch
):
    config = ItemsConfig(text_model=str(model_folder), levels=1, codes_per_level=4)
    loads, load = [], AutoModel.from_pretrained
    monkeypatch.setattr(
        AutoModel,
        "from_pretrained",
        lambda *given, **options: loads.append(given) or load(*given, **options),
    )
    report = build_catalogue(config, toy(titles=TEXTS), tmp_path / "out")
    assert len(loads) == 1, "not once more for the new items, of which there are none"
    assert report["collisions"]["after"]["items"] == 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in input_files(config)}
    with pytest.raises(UserError, match="items.text_model: .* is not a model folder"):
        build_catalogue(ItemsConfig(text_model=str(tmp_path)), toy(titles=TEXTS), tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
            r"no tokenizer \(none of tokenizer.json, vocab.txt\)",
        ),
        (lambda folder: os.truncate(folder / "model.safetensors", 500), "header"),
        (
            lambda folder: narrow(folder / "config.json"),
            r"another model than config.json: embeddings.LayerNorm.bias is \[16\], expected \[32\]",
        ),
        (
            lambda folder: deepen(folder / "config.json"),
            "another model than config.json: "
            "there is no encoder.layer.1.attention.output.LayerNorm.bias",
        ),
    ],
)
def test_a_damaged_folder_is_one_clear_line(model_folder, tmp_path, damage, message):
    shutil.copytree(model_folder, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(
        UserError, match=f"^items.text_model: .*model does not load: .*{message}"
    ) as raised:
        TextModel(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_pieces_of_whole_batches_give_the_bits_of_one_process(model_folder, tmp_path):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["oak", "elm", "ash"], n)) for n in random.integers(0, 30, 300)]

    @contextmanager
    def here(embed):
        yield Workers(embed, lambda vectors: vectors, 1)

    alone, _ = text_vectors(texts, 8, 0, tmp_path, model=model_folder)
    pieces, _ = text_vectors(
        texts, 8, 0, tmp_path, model=model_folder, spread=Spread(here, texts=64)
    )
    assert pieces.tobytes() == alone.tobytes()
    assert np.allclose(alone, TextModel(model_folder, 1).embed(texts), atol=1e-5)


def deepen(config):
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )


def narrow(config):
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))


def test_files_of_inner_folders_count_as_inputs_too(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    for name in ("1_Pooling", "0_Transformer", ".cache/huggingface"):
        (tmp_path / "model" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name / "config.json").write_text("{}")
    files = input_files(ItemsConfig(text_model=str(tmp_path / "model")))
    assert all(path.is_file() for path in files) and files == sorted(files)
    found = {str(path.relative_to(tmp_path / "model")) for path in files}
    assert (
        found >= {"config.json", "1_Pooling/config.json", "0_Transformer/config.json"}
        and ".cache/huggingface/config.json" not in found
    )


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "older sentence-embedding folder"])
def test_models_of_other_kinds(model_folder, tmp_path, kind):
    torch.manual_seed(1)
    if kind == "decoder":
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        GPTNeoXModel(
            GPTNeoXConfig(vocab_size=8, max_position_embeddings=32, **sizes)
        ).save_pretrained(tmp_path / "model")
    elif kind == "encoder-decoder":
        T5Model(
            T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).save_pretrained(tmp_path / "model")
    else:
        shutil.copytree(
            model_folder,
            tmp_path / "model" / "0_Transformer",
            ignore=shutil.ignore_patterns("1_Pooling"),
        )
    if kind != "older sentence-embedding folder":
        for file in model_folder.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "model")
    # One text is longer than the model takes, and one is empty.
    vectors = TextModel(tmp_path / "model").embed([*TEXTS, "oak " * 300, ""])
    assert vectors.shape == (len(TEXTS) + 2, 16) and np.allclose(
        np.linalg.norm(vectors, axis=1), [1] * 5 + [0], atol=1e-5
    )
    assert np.allclose(vectors[:1], TextModel(tmp_path / "model").embed(TEXTS[:1]), atol=1e-5)
    assert len(np.unique(vectors[: len(TEXTS)].round(4), axis=0)) == len(TEXTS)
    assert not TextModel(tmp_path / "model").embed(["", ""]).any()
