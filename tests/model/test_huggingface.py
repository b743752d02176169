"""Hugging Face checkpoints: logits as `transformers` computes them, in and out, under tp, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ilrec_dist.common.errors import UserError
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.model.hf.checkpoint import load_weights, read_config, save_weights
from ilrec_dist.testing.distributed import Mesh, run_distributed

SIZES = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS = {
    "llama": dict(rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "qwen2": dict(
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": dict(
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}


def make_tokens() -> torch.Tensor:
    return torch.randint(
        0, SIZES["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(0)
    )


def make_pretrained(family: str, folder: Path) -> torch.Tensor:
    """Save a small random model of `transformers`; its logits [3, 11, vocab]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **SIZES, **MODELS[family], max_position_embeddings=64, initializer_range=0.2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases and norms are made 0 and 1, which would hide a mix-up
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        logits = model(make_tokens()).logits
    model.save_pretrained(folder, max_shard_size="20KB")
    return logits


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(make_tokens())
            .logits
        )


def round_trip(mesh: Mesh, folder: str, out: str) -> tuple[torch.Tensor, tuple[int, int]]:
    """Load, compute this rank's logits, save again."""
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        model = Backbone(pretrained.config, pretrained.vocab_size, pretrained.max_positions).eval()
        load_weights(model, folder)
        tokens = make_tokens()
        hidden = model(tokens, torch.arange(tokens.numel())).final
        save_weights(model, out, torch.float32)
        return (hidden @ model.head_weight.t()).detach().view(*tokens.shape, -1), model.vocab_range
    finally:
        destroy_parallel()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", MODELS)
def test_logits_as_transformers(family: str, tp: int, tmp_path: Path) -> None:
    expected = make_pretrained(family, tmp_path / "in")
    ranks = run_distributed(round_trip, tp, tp, str(tmp_path / "in"), str(tmp_path / "out"))
    logits = torch.cat([part for part, _ in ranks], dim=-1)
    assert logits.shape[-1] == 56  # 53 padded to a multiple of 8
    torch.testing.assert_close(logits[..., :53], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def more_vocabulary(mesh: Mesh, folder: str) -> dict[str, torch.Tensor]:
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        model = Backbone(pretrained.config, 90, pretrained.max_positions, seed=4)
        fresh = model.full_state_dict()
        load_weights(model, folder)
        loaded = model.full_state_dict()
        name = "embedding.word_embeddings.weight"
        return {"fresh": fresh[name], "loaded": loaded[name]}
    finally:
        destroy_parallel()


def test_new_tokens_keep_their_initialisation(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make_pretrained("qwen2", tmp_path / "in")
    table = next(
        t
        for path in (tmp_path / "in").glob("*.safetensors")
        for name, t in load_file(path).items()
        if "embed_tokens" in name
    )
    for rank in run_distributed(more_vocabulary, 2, 2, str(tmp_path / "in")):
        assert torch.equal(rank["loaded"][:53], table)
        assert torch.equal(rank["loaded"][53:], rank["fresh"][53:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, ["mixtral", "llama"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["yarn"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
    ],
)
def test_a_config_that_cannot_be_built_is_named(
    change: dict, words: list[str], tmp_path: Path
) -> None:
    given = {
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8,
        **SIZES,
        **change,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in given.items() if value is not None})
    )
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert all(word in str(caught.value) for word in [*words, "config.json"])


def load_refused(mesh: Mesh, folder: str) -> str:
    initialize_parallel(mesh.tp, "cpu")
    try:
        pretrained = read_config(folder)
        with pytest.raises(UserError) as caught:
            load_weights(Backbone(pretrained.config, pretrained.vocab_size, 8), folder)
        return str(caught.value)
    finally:
        destroy_parallel()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    make_pretrained("llama", tmp_path / "in")
    victim = sorted((tmp_path / "in").glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    assert victim.name in run_distributed(load_refused, 1, 1, str(tmp_path / "in"))[0]
    victim.unlink()
    assert victim.name in run_distributed(load_refused, 1, 1, str(tmp_path / "in"))[0]
