"""The weights that a training on a language model begins with, for every tp."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from transformers import AutoTokenizer

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.items.build import build_catalogue
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.language_model import LANGUAGE_MODEL, LanguageModel, title_counts
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.model.hf.new_rows import BLOCK_ROWS, NewRows
from ilrec_dist.model.hf.tensor_files import TensorReader
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.testing.distributed import run_distributed
from tests.support.language_models import make_language_model, model_config
from tests.support.start import TITLES, shop, start_weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("new_tokens", ["moments", "text"])
def test_old_rows_are_the_models_and_new_ones_are_drawn_alike_for_every_tp(
    tied: bool, new_tokens: str, tmp_path: Path
) -> None:
    model = make_language_model(tmp_path / "llama", TITLES, tied)
    items = ItemsConfig(form="atomic")
    config = model_config(
        tmp_path, model, {"new_tokens": new_tokens}, items=dataclasses.asdict(items)
    )
    rows = read_config(model).vocab_size
    build_catalogue(items, shop(), config.run_dir / "items", None, LanguageModel(model, rows))
    (one,) = run_distributed(start_weights, 1, 1, config_to_dict(config))
    launch = dataclasses.replace(config.launch, workers=2, tp=2)
    tree = config_to_dict(dataclasses.replace(config, launch=launch))
    for state in run_distributed(start_weights, 2, 2, tree):
        assert state.keys() == one.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, state[name]), name
    vocabulary = RunArtifacts(config).catalogue.vocabulary
    size = vocabulary.base_size
    base = load_file(model / "model.safetensors")
    pairs = {"embedding.word_embeddings.weight": "model.embed_tokens.weight"}
    if not tied:
        pairs["output_layer.weight"] = "lm_head.weight"
    for name, key in pairs.items():
        old, drawn = base[key][:size].double(), one[name][size : size + 6].double()
        assert torch.equal(one[name][:size], base[key][:size])
        if new_tokens == "moments":
            assert 0.6 < float(drawn.std() / old.std()) < 1.6
            continue
        tokenizer = AutoTokenizer.from_pretrained(model)
        for title, row in zip(TITLES, drawn, strict=True):
            ids = tokenizer(title, add_special_tokens=False).input_ids
            distance = row - old[ids].mean(0) if ids else row
            expected = float(old.std()) * (0.1 if ids else 1.0)
            assert 0.5 * expected < float(distance.square().mean().sqrt()) < 1.7 * expected


def test_the_mean_and_the_spread_are_those_of_each_column(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    spread, mean = torch.tensor([0.1, 1.0, 5.0]), torch.tensor([3.0, -2.0, 0.0])
    table = torch.randn(9000, 3, generator=generator) * spread + mean
    # The spare rows behind the tokens' are no part of it.
    save_file(
        {"table": torch.cat([table, torch.full((10, 3), 1e6)])}, tmp_path / "model.safetensors"
    )
    reader = TensorReader(tmp_path)
    rows = NewRows(9000, 9000 + 5000)
    drawn = rows.draw(reader, "table", "table", 0, 9000, 14000)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0.05, atol=0.2)
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.05, atol=0)
    # Any part of the rows is drawn as within the whole.
    for first, last in (
        (9000, 9001),
        (9000 + BLOCK_ROWS - 1, 9000 + BLOCK_ROWS + 1),
        (13999, 14000),
    ):
        part = rows.draw(reader, "table", "table", 0, first, last)
        assert torch.equal(part, drawn[first - 9000 : last - 9000])
    assert not torch.equal(drawn, rows.draw(reader, "table", "table", 1, 9000, 14000))
    counts = np.zeros((5000, 9000))
    counts[7, [2, 8999]] = 1, 3
    text = NewRows(9000, 14000, csr_matrix(counts)).draw(reader, "table", "table", 0, 9000, 14000)
    near = (table[2] + 3 * table[8999]) / 4
    torch.testing.assert_close(text[7], near + 0.1 * (drawn[7] - mean), rtol=1e-4, atol=0.02)
    assert torch.equal(text[:7], drawn[:7])


def test_titles_are_counted_for_every_code_that_their_items_carry(tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "llama", TITLES)
    source = LanguageModel(model, read_config(model).vocab_size)
    (tmp_path / "s.index.json").write_text(
        '{"item 0": ["<a_0>", "<b_0>"], "item 1": ["<a_0>", "<b_1>"], "item 2": ["<a_1>", "<b_0>"],'
        ' "item 3": ["<a_1>", "<b_1>"], "item 4": ["<a_1>", "<b_2>"], "item 5": ["<a_2>", "<b_0>"]}'
    )
    items = ItemsConfig(index=str(tmp_path / "s.index.json"))
    build_catalogue(items, shop(), tmp_path / "items", None, source)
    catalogue = Catalogue.load(tmp_path / "items")
    counts = title_counts(tmp_path / "items" / LANGUAGE_MODEL, catalogue, TITLES).toarray()
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = np.zeros_like(counts)
    carriers = {"<a_0>": [0, 1], "<a_1>": [2, 3, 4], "<a_2>": [5]}
    carriers |= {"<b_0>": [0, 2, 5], "<b_1>": [1, 3], "<b_2>": [4]}
    names = list(catalogue.token_names().values())[::-1]
    for name, carried in carriers.items():
        for item in carried:
            for token in tokenizer(TITLES[item], add_special_tokens=False).input_ids:
                expected[names.index(name), token] += 1
    assert (counts == expected).all() and counts.sum() > 20
