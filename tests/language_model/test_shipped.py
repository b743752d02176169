"""What ships for language models: configurations
that fit their models, and `make llm` in small.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cli import main
from ilrec_dist.config.load import load_config
from ilrec_dist.data.dataset import load_dataset
from tests.support.exported import catalogue_ids, recommended
from tests.support.language_models import make_language_model

ROOT = Path(__file__).resolve().parents[2]
# The sizes in the models' own config.json.
SIZES = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    },
}


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize(
    ("kind", "workers", "trainable"), [("lora", 8, "lora+new_rows"), ("full", 32, "full")]
)
def test_configurations_fit_the_models_that_they_are_for(
    model: str, kind: str, workers: int, trainable: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES[model]))
    path = str(ROOT / f"configs/{model}-{kind}.yaml")
    assert main(["config", path, f"backbone.from={tmp_path}"]) == 0
    assert f"from: {tmp_path}" in capsys.readouterr().out
    config = load_config(path)
    assert (config.launch.workers, config.train.trainable) == (workers, trainable)
    assert config.train.batch_size % (config.launch.dp * config.train.accumulation_steps) == 0
    # All five tasks of LC-Rec have a share.
    assert all(share > 0 for share in vars(config.prompts.shares).values())
    # It fits the GPUs that it is for.
    index = tmp_path / "index.json"
    codes = [[f"<{level}_{code}>" for level in "abcd"] for code in range(256)]
    index.write_text(json.dumps(dict(enumerate(codes))))
    hardware = ["--nodes", str(workers // 8), "--gpus-per-node", "8", "--gpu-memory", "80GiB"]
    overrides = [f"backbone.from={tmp_path}", f"items.index={index}"]
    assert main(["plan", path, *overrides, *hardware]) == 0
    trained = re.search(r"  trained +([\d,]+) ", capsys.readouterr().out)
    assert trained is not None and (len(trained[1]) > 10) == (kind == "full")


@pytest.mark.slow
def test_the_commands_of_make_llm_with_a_tiny_model(tmp_path: Path) -> None:
    config = str(ROOT / "configs/llm.yaml")
    small = [f"runs_dir={tmp_path}", "data.synthetic.users=60", "cf.epochs=2", "launch.threads=1"]
    assert main(["prepare", config, *small, "backbone.from=none"]) == 0
    titles = load_dataset(tmp_path / "llm/data").titles
    assert titles is not None
    model = make_language_model(tmp_path / "llama", titles, True, positions=160)
    assert main(["run", config, *small, f"backbone.from={model}"]) == 0
    rows = {
        row["method"] for row in json.loads((tmp_path / "llm/results.json").read_text())["rows"]
    }
    assert {"sft", "ilrec"} <= rows
    out = tmp_path / "exported"
    assert main(["export", str(tmp_path / "llm"), str(out), "--merge"]) == 0
    history = catalogue_ids(out)[::40]
    script = [sys.executable, str(ROOT / "examples/recommend_with_transformers.py"), str(out)]
    script += ["--history", *history]
    # Outside the repository the script finds nothing of this project.
    done = subprocess.run(script, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prompt, *lines = done.stdout.splitlines()
    assert prompt.startswith("A customer bought ")
    expected = recommended(tmp_path / "llm", [history], tmp_path, "--top", "5", "--exclude-seen")
    found = [(line.split()[1], float(line.split()[0])) for line in lines[:5]]
    assert [item for item, _ in found] == [item for item, _ in expected]
    # The script prints three decimals.
    np.testing.assert_allclose(
        [score for _, score in found], [score for _, score in expected], atol=6e-4
    )
