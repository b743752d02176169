"""A run that begins with a language model: its ids, weights, results and export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilrec_dist.cli import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.evaluation.predictions import Predictions
from ilrec_dist.evaluation.ranking import evaluate_treatments
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.language_model import LANGUAGE_MODEL
from ilrec_dist.pipeline import evaluate_trained, rankings
from ilrec_dist.pipeline.execute import execute, open_run
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.pipeline.worker_tasks import train_and_evaluate
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.exported import catalogue_ids, generated, recommended
from tests.support.language_models import SPARE_ROWS, make_language_model, model_config
from tests.support.shop import damage
from tests.support.tiny_run import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Path, Path]:
    """(the folder of runs with one whose data are prepared, a language
    model's folder).
    """
    root = tmp_path_factory.mktemp("shop")
    config = tiny_config(root)
    execute(config, "prepare")
    titles = load_dataset(config.run_dir / "data").titles
    assert titles is not None
    return root, make_language_model(root / "llama", titles)


@pytest.fixture(scope="module")
def finished(shop) -> Config:
    """A whole run, SFT and ILRec, an epoch each."""
    root, model = shop
    config = model_config(root, model, train={"epochs": 1, "learning_rate": 2e-3})
    execute(config, "run")
    return config


@pytest.fixture(scope="module")
def exported(finished) -> Path:
    out = finished.run_dir.parent / "exported"
    assert main(["export", str(finished.run_dir), str(out), "--method", "ilrec"]) == 0
    return out


def test_codes_have_the_ids_that_the_models_tokenizer_gives(shop, finished) -> None:
    catalogue = Catalogue.load(finished.run_dir / "items")
    names = catalogue.token_names()
    tokenizer = AutoTokenizer.from_pretrained(shop[1])
    size = len(tokenizer)
    tokenizer.add_tokens(list(names.values())[::-1])
    assert [tokenizer.convert_tokens_to_ids(name) for name in names.values()] == list(names)
    assert sorted(names) == list(range(size, size + 16))
    # The spare rows of the embedding are the first ones of the item tokens.
    assert catalogue.vocabulary.base_size == size
    assert catalogue.vocab_size == size + 16
    assert json.loads((shop[1] / "config.json").read_text())["vocab_size"] == size + SPARE_ROWS


def test_the_run_has_results_of_both_methods(finished) -> None:
    results = json.loads((finished.run_dir / "results.json").read_text())
    assert {"sft", "ilrec", "popularity", "sasrec"} <= {row["method"] for row in results["rows"]}


def test_stages_run_again_when_the_bytes_change_that_they_read(
    shop, finished, tmp_path: Path, capsys
) -> None:
    execute(finished, "run")
    assert capsys.readouterr().out.count("unchanged") >= 7
    copy = tmp_path / "elsewhere"
    shutil.copytree(shop[1], copy)

    def current() -> list[str]:
        backbone = dataclasses.replace(finished.backbone, from_=str(copy))
        run = open_run(dataclasses.replace(finished, backbone=backbone))
        return [name for name in run.stages if run.is_current(name)]

    everything = current()
    assert len(everything) == 7
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert current() == ["prepare", "index", "cf", "rewards"]
    with (copy / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    assert current() == ["prepare", "cf"]


def test_the_exported_tokenizer_reads_codes_and_words(shop, finished, exported) -> None:
    tokenizer, base = (
        AutoTokenizer.from_pretrained(exported),
        AutoTokenizer.from_pretrained(shop[1]),
    )
    catalogue = Catalogue.load(finished.run_dir / "items")
    names = catalogue.token_names()
    for row in np.asarray(catalogue.tokens).tolist():
        text = "".join(names[token] for token in row)
        assert tokenizer(text, add_special_tokens=False).input_ids == row
        assert tokenizer.decode(row, skip_special_tokens=True) == text
    words = "A quiet lamp for the night"
    assert tokenizer(words).input_ids == base(words).input_ids
    assert len(tokenizer) == catalogue.vocab_size


def test_transformers_gives_our_logits(finished, exported) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    with open_trained_model(finished.run_dir, "ilrec") as trained:
        size = trained.artifacts.catalogue.vocab_size
        tokens = torch.randint(0, size, (3, 17), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            hidden = trained.backbone(tokens, torch.arange(tokens.numel())).final
            ours = (hidden @ trained.backbone.head_weight.t())[:, :size]
            theirs = model(tokens).logits.flatten(0, 1)
    assert theirs.shape == ours.shape
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def test_generate_finds_what_recommend_finds(finished, exported, tmp_path: Path) -> None:
    ids = catalogue_ids(exported)
    history = [ids[3], ids[40], ids[7]]
    flags = ("--method", "ilrec", "--top", "10")
    expected = recommended(finished.run_dir, [history], tmp_path, *flags)
    found = generated(exported, history, beams=10)[:10]
    assert [item for item, _ in found] == [item for item, _ in expected]
    np.testing.assert_allclose(
        [score for _, score in found], [score for _, score in expected], atol=1e-4
    )


def test_damaged_files_of_the_tokenizer_are_refused_by_name(
    finished, tmp_path: Path, capsys
) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    paths = sorted((tmp_path / f"run/items/{LANGUAGE_MODEL}").iterdir())
    assert {"tokenizer.json", "config.json"} <= {path.name for path in paths}
    for path in paths:
        whole = path.read_bytes()
        for cut in (False, True):
            if cut:
                path.write_bytes(whole[: len(whole) // 2])
            else:
                damage(path)
            assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{path.name}: damaged" in line and "ilrec index" in line
        path.unlink()
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
        assert f"{path.name}: missing" in capsys.readouterr().err
        path.write_bytes(whole)
        assert not (tmp_path / "out").exists()


def test_weights_that_training_left_alone_come_out_byte_for_byte(shop, tmp_path: Path) -> None:
    root = shop[0]
    titles = load_dataset(root / "tiny/data").titles
    model = make_language_model(tmp_path / "llama", titles, True, torch.bfloat16)
    # A rate that is lost in the rounding of every weight.
    train = {"epochs": 1, "learning_rate": 1e-30, "methods": ["sft"], "warmup": 0}
    config = model_config(tmp_path, model, {"new_tokens": "text"}, train=train)
    for stage in ("prepare", "index", "train"):
        execute(config, stage)
    # A finished run does without the model that it began with.
    elsewhere = model.rename(tmp_path / "elsewhere")
    out = tmp_path / "out"
    assert main(["export", str(config.run_dir), str(out), "--dtype", "bfloat16"]) == 0
    before, after = load_file(elsewhere / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    size = Catalogue.load(config.run_dir / "items").vocabulary.base_size
    for name, tensor in before.items():
        written = after[name][:size] if "embed_tokens" in name else after[name]
        original = tensor[:size] if "embed_tokens" in name else tensor
        assert written.dtype == original.dtype
        assert torch.equal(written.view(torch.uint8), original.view(torch.uint8)), name


def parts_ranked(mesh: Mesh, tree: dict, before: dict[str, str]) -> list[int]:
    """As a worker of `ilrec evaluate` does; the users of each part that was ranked."""
    sizes: list[int] = []

    def counted(*args: Any, users: np.ndarray, **rest: Any) -> list[Predictions]:
        sizes.append(len(users))
        return evaluate_treatments(*args, users=users, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankings, "PART_USERS", 40 * rankings.PRETRAINED_SHARE)
        patch.setattr(evaluate_trained, "evaluate_treatments", counted)
        train_and_evaluate(tree, [], before)
    return sizes


def test_a_pretrained_models_evaluation_saves_small_parts(finished, tmp_path) -> None:
    shutil.copytree(finished.run_dir, tmp_path / finished.name)
    config = dataclasses.replace(finished, runs_dir=str(tmp_path))
    shutil.rmtree(tmp_path / finished.name / "evaluation")
    before = open_run(config).fingerprints_before("evaluate")
    (sizes,) = run_distributed(parts_ranked, 1, 1, config_to_dict(config), before)
    users = len(load_dataset(config.run_dir / "data").evaluated("test"))
    assert users > 80 and max(sizes) == 40 and sum(sizes) == 2 * users
