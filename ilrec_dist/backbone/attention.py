"""The core attention of every layer: torch's scaled_dot_product_attention in training, a prefix-sharing KV cache in beam search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class LayerCache:
    """One layer's keys and values: of the user's prefix, held once per user, and of each beam's own suffix."""

    prefix_key: Tensor | None = None  # [B, heads_kv, S, head_dim]
    prefix_value: Tensor | None = None
    suffix_key: Tensor | None = None  # [B, K, T, heads_kv, head_dim], T the number of tokens decoded so far
    suffix_value: Tensor | None = None


@dataclass
class Cache:
    """What decoding remembers of a batch of users with equally long prefixes. Changed in place by `Backbone.decode`."""

    batch: int
    prefix: int  # tokens of the prefix, S
    suffix: int = 0  # tokens decoded so far, T
    beams: int = 0  # K of the last step
    layers: list[LayerCache] = field(default_factory=list)

    def reorder(self, parents: Tensor) -> None:
        """Beam k of user b goes on from beam parents[b, k] (int64 [B, K']) of the step before. The prefix is shared and stays."""
        for layer in self.layers:
            if layer.suffix_key is not None and layer.suffix_value is not None:
                index = parents[:, :, None, None, None].expand(-1, -1, *layer.suffix_key.shape[2:])
                layer.suffix_key = layer.suffix_key.gather(1, index)
                layer.suffix_value = layer.suffix_value.gather(1, index)


class CoreAttention(torch.nn.Module):
    """Causal attention on [B, S, heads, head_dim] without dropout; Megatron hands on `attention_mask` unread, which carries the cache here.

    The batch comes first (Megatron's own layout has the sequence first): nothing but this module and the rotary table sees the difference, and
    no transpose of the residual stream is needed.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.index = layer_number - 1
        self.scale = config.softmax_scale  # None: 1 / sqrt(head_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Cache | None, /, **_: Any) -> Tensor:
        """query [B, S, heads, head_dim], key and value [B, S, heads_kv, head_dim] → [B, S, heads · head_dim].

        attention_mask: None in training, the cache in prefill (empty) and in decoding, where the S queries are the beams of a user.
        """
        cache = attention_mask
        if cache is not None and len(cache.layers) > self.index:
            return self._decode(query, key, value, cache.layers[self.index])
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            cache.layers.append(LayerCache(key, value))
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerCache) -> Tensor:
        """One new token per beam, [B, K, heads, head_dim], against [the user's prefix] + [the beam's suffix and the token itself]."""
        if layer.suffix_key is None or layer.suffix_value is None:
            layer.suffix_key, layer.suffix_value = key.unsqueeze(2), value.unsqueeze(2)
        else:
            layer.suffix_key = torch.cat((layer.suffix_key, key.unsqueeze(2)), dim=2)
            layer.suffix_value = torch.cat((layer.suffix_value, value.unsqueeze(2)), dim=2)
        assert layer.prefix_key is not None and layer.prefix_value is not None
        batch, beams, heads, width = query.shape
        groups = key.shape[2]
        scale = self.scale if self.scale is not None else width**-0.5
        grouped = query.view(batch, beams, groups, heads // groups, width) * scale
        # b user, k beam, g key/value head, r query head of the group, s prefix position, t suffix position, d head_dim
        over_prefix = torch.einsum("bkgrd,bgsd->bkgrs", grouped, layer.prefix_key)
        over_suffix = torch.einsum("bkgrd,bktgd->bkgrt", grouped, layer.suffix_key)
        weights = torch.cat((over_prefix, over_suffix), dim=-1).float().softmax(dim=-1).to(value.dtype)
        of_prefix, of_suffix = weights.split((over_prefix.shape[-1], over_suffix.shape[-1]), dim=-1)
        out = torch.einsum("bkgrs,bgsd->bkgrd", of_prefix, layer.prefix_value) + torch.einsum("bkgrt,bktgd->bkgrd", of_suffix, layer.suffix_value)
        return out.reshape(batch, beams, heads * width)
