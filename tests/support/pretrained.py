"""Small random models of transformers, and what it makes of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

needs_peft = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "accelerate")),
    reason="needs peft and accelerate: pip install --no-deps peft accelerate",
)


SIZES = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
MODELS = {
    "llama": dict(rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    "qwen2": dict(rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=QWEN_ROPE),
    "qwen3": dict(
        rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=16, rope_parameters=QWEN_ROPE
    ),
}


def make_tokens(vocab_size: int = 53) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))


def make_pretrained(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB"
) -> torch.Tensor:
    """Save a small random model of `transformers`; its logits [3, 11, vocab]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **MODELS[family], initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms are made 0 and 1, which would hide a mix-up.
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        logits = model(make_tokens()).logits
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return logits


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())
