"""Attention without gradients on a CPU is causal attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ilrec_dist.model import attention as module
from ilrec_dist.model.attention import QUERY_BLOCK, CoreAttention
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.layers import transformer_config


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, QUERY_BLOCK, QUERY_BLOCK + 1, 3 * QUERY_BLOCK - 1])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    length: int,
    groups: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    heads, width = 6, 12
    # Long sequences go one by one then, short ones together.
    monkeypatch.setattr(module, "BLOCK_SCORES", 1 << 16)
    draw = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(batch, length, n, width, generator=draw).to(dtype)
        for n in (heads, groups, groups)
    )
    config = BackboneConfig(num_layers=2, hidden_size=heads * width, num_heads=heads)
    attention = CoreAttention(transformer_config(config, "fp32", 1), layer_number=1)
    expected = F.scaled_dot_product_attention(
        *(part.double().transpose(1, 2) for part in (query, key, value)),
        is_causal=True,
        enable_gqa=True,
    )
    attended = attention(query, key, value, None)
    assert attended.dtype == dtype
    torch.testing.assert_close(
        attended.double(), expected.transpose(1, 2).flatten(2), rtol=0, atol=bound
    )
