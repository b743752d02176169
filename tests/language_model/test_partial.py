"""LoRA and new rows on a frozen language model:
what changes, what is saved, any tp, resuming.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ilrec_dist.cli import main
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config, ConfigError
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.hf.source import weights_sha256
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.pipeline.trained_model import find_trained, loaded_here
from ilrec_dist.testing.distributed import run_distributed
from ilrec_dist.testing.whole_weights import whole_weights
from tests.support.language_models import make_language_model, model_config
from tests.support.partial_training import gradients, train
from tests.support.pretrained import needs_peft
from tests.support.tiny_run import losses_of

TRAIN = {"epochs": 1, "learning_rate": 5e-3, "methods": ["sft"], "validation_users": 20}
LORA = {"rank": 4, "alpha": 8.0}


@dataclasses.dataclass(frozen=True)
class Shop:
    """Runs with data and codes in place, on a tied and an untied model."""

    root: Path

    def config(self, tied: bool = True, tp: int = 1, **train: Any) -> Config:
        name = "tied" if tied else "untied"
        launch = {"workers": tp, "tp": tp}
        source = self.root / name
        return model_config(self.root / f"{name}-runs", source, launch=launch, train=TRAIN | train)

    def tree(self, tied: bool = True, tp: int = 1, **train: Any) -> dict[str, Any]:
        return config_to_dict(self.config(tied, tp, **train))


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("shop"))
    make_language_model(shop.root / "tied", ["a"], tied=True)
    make_language_model(shop.root / "untied", ["a"], tied=False)
    for tied in (True, False):
        execute(shop.config(tied), "prepare")
        execute(shop.config(tied), "index")
    return shop


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_gradients_are_those_of_full_training_without_the_frozen_weights(
    shop: Shop, tied: bool, tp: int
) -> None:
    for full, rows, both, lora in zip(
        *(
            run_distributed(gradients, tp, tp, shop.tree(tied, tp), trainable)
            for trainable in ("full", "new_rows", "lora+new_rows", "lora")
        ),
        strict=True,
    ):
        tables = ["rows/embedding"] if tied else ["rows/embedding", "rows/head"]
        for name in tables:
            # Adapters add nothing before their first step.
            for found in (rows, both):
                torch.testing.assert_close(found[name], full[name], rtol=1e-5, atol=1e-6)
        assert {name.split(".")[0] for name in rows} == {"trained_rows", *tables}
        assert {name.split(".")[0] for name in both} == {"trained_rows", "lora", *tables}
        assert {name.split(".")[0] for name in lora} == {"lora"}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_models_own_weights_keep_every_byte_and_tp_changes_nothing(
    shop: Shop, tied: bool, tmp_path: Path
) -> None:
    states = {}
    for tp in (1, 2):
        tree = shop.tree(tied, tp, trainable="lora+new_rows", lora=LORA)
        ranks = run_distributed(train, tp, tp, tree, str(tmp_path / str(tp)))
        changed = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
        width, items = 32, 16
        tables = [name for name, count in changed.items() if count]
        assert len(tables) == (1 if tied else 2)
        assert all(changed[name] <= items * width for name in tables)
        states[tp] = whole_weights(tmp_path / str(tp) / "final")
    rows = {"new_rows.embedding"} if tied else {"new_rows.embedding", "new_rows.head"}
    assert {name for name in states[1] if "lora_" not in name} == rows
    np.testing.assert_allclose(
        losses_of(tmp_path / "2"), losses_of(tmp_path / "1"), rtol=0, atol=1e-4
    )
    assert losses_of(tmp_path / "1")[-1] < losses_of(tmp_path / "1")[0] - 0.1
    assert states[2].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert float((states[2][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name
    model = json.loads((tmp_path / "2" / "result.json").read_text())["model"]
    assert model["base_sha256"] == weights_sha256(shop.config(tied).backbone.from_)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_training_ends_with_the_same_bits(
    shop: Shop, precision: str, tmp_path: Path
) -> None:
    tree = shop.tree(trainable="lora+new_rows", lora=LORA | {"dropout": 0.1}, precision=precision)
    run_distributed(train, 1, 1, tree, str(tmp_path / "whole"))
    run_distributed(train, 1, 1, tree, str(tmp_path / "cut"), 3)
    (kept,) = (tmp_path / "cut/checkpoints").iterdir()
    # A checkpoint has no frozen weights.
    names = json.loads((kept / "manifest.json").read_text())["layout"]["shapes"]
    assert names
    assert not any(".gpt." in name for name in names)
    run_distributed(train, 1, 1, tree, str(tmp_path / "cut"))
    whole, cut = (whole_weights(tmp_path / name / "final") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_goes_on_under_another_tp_with_the_same_losses(
    shop: Shop, tied: bool, tmp_path: Path
) -> None:
    # The rows lie at the end of the vocabulary, on one rank of two.
    for tp, stop in ((1, 2), (2, 4), (1, None)):
        tree = shop.tree(tied, tp, trainable="lora+new_rows", lora=LORA)
        run_distributed(train, tp, tp, tree, str(tmp_path / "cut"), stop)
    run_distributed(train, 1, 1, tree, str(tmp_path / "whole"))
    expected, found = losses_of(tmp_path / "whole"), losses_of(tmp_path / "cut")
    assert len(found) == len(expected) > 4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_packing_changes_no_loss(shop: Shop, tmp_path: Path) -> None:
    tree = shop.tree(trainable="lora+new_rows", lora=LORA)
    run_distributed(train, 1, 1, tree, str(tmp_path / "packed"))
    run_distributed(train, 1, 1, tree, str(tmp_path / "padded"), None, 1.0)
    np.testing.assert_allclose(
        losses_of(tmp_path / "packed"), losses_of(tmp_path / "padded"), rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_full_training_may_give_new_rows_a_rate_of_their_own(shop: Shop, tmp_path: Path) -> None:
    frozen = shop.tree(False, learning_rate=1e-30, new_rows_learning_rate=5e-3)
    ((changed),) = run_distributed(train, 1, 1, frozen, str(tmp_path / "frozen"))
    assert {name for name, count in changed.items() if count} == {
        "embedding.word_embeddings.weight", "output_layer.weight"
    }  # fmt: skip
    equal = shop.tree(False, new_rows_learning_rate=5e-3)
    run_distributed(train, 1, 1, equal, str(tmp_path / "equal"))
    run_distributed(train, 1, 1, shop.tree(False), str(tmp_path / "one"))
    np.testing.assert_allclose(
        losses_of(tmp_path / "equal"), losses_of(tmp_path / "one"), rtol=0, atol=1e-4
    )
    states = [whole_weights(tmp_path / name / "final") for name in ("equal", "one")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert float((states[0][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


@pytest.fixture(scope="module")
def finished(shop: Shop) -> Config:
    """A whole run of both methods on the untied
    model in bf16 with tp 2, and its adapters moved.

    Adapters of some modules only, so that weights of the others are left alone.
    """
    lora = LORA | {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    train = {"trainable": "lora+new_rows", "lora": lora, "precision": "bf16"}
    config = shop.config(False, 2, methods=["sft", "ilrec"], learning_rate=2e-2, **train)
    execute(config, "run")
    return config


@pytest.fixture(scope="module")
def prompt(finished: Config) -> torch.Tensor:
    size = Catalogue.load(finished.run_dir / "items").vocab_size
    return torch.randint(0, size, (3, 17), generator=torch.Generator().manual_seed(0))


def export(config: Config, out: Path, *words: str) -> Path:
    assert main(["export", str(config.run_dir), str(out), "--method", "ilrec", *words]) == 0
    return out


@torch.no_grad()
def our_logits(config: Config, prompt: torch.Tensor) -> torch.Tensor:
    weights = find_trained(run_config(config.run_dir), "ilrec")
    # Without the rounding of train.precision.
    exact = dataclasses.replace(weights.config.train, precision="fp32")
    exact_config = dataclasses.replace(weights.config, train=exact)
    with loaded_here(dataclasses.replace(weights, config=exact_config)) as trained:
        assert trained.backbone.lora is not None
        hidden = trained.backbone(prompt, torch.arange(prompt.numel())).final
        logits = hidden @ trained.backbone.head_weight.t()
        return logits[:, : trained.backbone.vocab_size].view(*prompt.shape, -1)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
def test_a_run_with_adapters_has_results_and_recommends(finished: Config, tmp_path: Path) -> None:
    results = json.loads((finished.run_dir / "results.json").read_text())
    assert {"sft", "ilrec"} <= {row["method"] for row in results["rows"]}
    dataset = load_dataset(finished.run_dir / "data")
    history = [dataset.item_ids[item] for item in dataset.sequence(0)[:3]]
    table = pa.table({"user": ["u"], "items": pa.array([history], pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    words = ["--histories", str(tmp_path / "in.parquet"), "--out", str(out)]
    words += ["launch.workers=1", "launch.tp=1"]
    assert main(["recommend", str(finished.run_dir), *words]) == 0
    assert pq.read_table(out).num_rows == 10


@pytest.mark.slow
def test_merged_weights_give_our_logits_and_the_others_keep_every_byte(
    finished: Config, prompt: torch.Tensor, tmp_path: Path, capsys
) -> None:
    out = export(finished, tmp_path / "merged", "--merge")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(prompt).logits
    assert distance(our_logits(finished, prompt), theirs) <= 1e-5
    base = load_file(Path(str(finished.backbone.from_)) / "model.safetensors")
    merged = load_file(out / "model.safetensors")
    size = Catalogue.load(finished.run_dir / "items").vocabulary.base_size
    for name, tensor in base.items():
        table = name.startswith(("model.embed_tokens", "lm_head"))
        kept = (
            torch.equal(merged[name][:size], tensor[:size])
            if table
            else torch.equal(merged[name], tensor)
        )
        assert kept != any(part in name for part in ("q_proj", "v_proj", "down_proj")), name
    capsys.readouterr()
    rounded = export(finished, tmp_path / "rounded", "--merge", "--dtype", "bfloat16")
    line = capsys.readouterr().out
    by_rounding, by_adapters = (float(part[:-1]) for part in re.findall(r"[0-9.]+%", line))
    assert 0 < by_rounding < by_adapters
    weights = load_file(rounded / "model.safetensors")
    assert all(torch.equal(weights[name], merged[name].bfloat16()) for name in merged)


@pytest.mark.slow
@needs_peft
def test_peft_loads_the_adapter_with_our_logits(
    finished: Config, prompt: torch.Tensor, tmp_path: Path
) -> None:
    import peft

    out = export(finished, tmp_path / "adapter")
    assert not (out / "config.json").exists() and (out / "catalogue.parquet").exists()
    base = AutoModelForCausalLM.from_pretrained(finished.backbone.from_)
    base.resize_token_embeddings(Catalogue.load(finished.run_dir / "items").vocab_size)
    model = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        assert distance(model(prompt).logits, our_logits(finished, prompt)) <= 1e-5


@pytest.mark.slow
def test_another_base_and_a_base_that_is_gone_are_refused(
    finished: Config, tmp_path: Path, capsys
) -> None:
    base = Path(str(finished.backbone.from_))
    weights = base / "model.safetensors"
    original = weights.read_bytes()
    command = ["export", str(finished.run_dir), str(tmp_path / "out")]
    try:
        weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert main(command) == 2
        assert "trained on a model whose weights have the SHA-256" in capsys.readouterr().err
        base.rename(tmp_path / "moved")
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"stands on the model that its training began with, {base}" in error
        assert error.count("\n") == 1
    finally:
        if (tmp_path / "moved").exists():
            (tmp_path / "moved").rename(base)
        weights.write_bytes(original)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.trainable=lora"], "'train.trainable': has no effect here: .* backbone.from"),
        (
            ["backbone.from=m", "train.lora.rank=4"],
            "'train.lora': has no effect .* train.trainable lora",
        ),
        (["backbone.from=m", "train.trainable=adapters"], "'train.trainable'"),
        (
            ["backbone.from=m", "train.trainable=lora", "train.lora.target_modules=[query]"],
            "target_modules.0': input should be 'q_proj'",
        ),
        (
            ["backbone.from=m", "train.trainable=new_rows", "train.new_rows_learning_rate=1e-3"],
            "'train.new_rows_learning_rate': has no effect here: .* full or lora",
        ),
        (
            ["backbone.from=m", "train.trainable=lora", "train.lora.dropout=0.1", "launch.tp=2"]
            + ["launch.workers=2"],
            "'train.lora.dropout': 0.1 needs launch.tp 1, not 2",
        ),
    ],
)
def test_keys_without_effect_are_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("{}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml", overrides)
