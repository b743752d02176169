"""The core attention of every layer: torch's scaled_dot_product_attention in training, a prefix-sharing KV cache in beam search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class LayerKVCache:
    """One layer's keys and values: of the user's prefix, held once per user, and of each beam's own suffix."""

    prefix_key: Tensor | None = None  # [B, heads_kv, S, head_dim]
    prefix_value: Tensor | None = None
    suffix_key: Tensor | None = (
        None  # [B, K, T, heads_kv, head_dim], T the number of tokens decoded so far
    )
    suffix_value: Tensor | None = None


@dataclass
class KVCache:
    """What decoding remembers of a batch of users with equally long prefixes. Changed in place by `Backbone.decode`."""

    prefix: int  # tokens of the prefix, S
    suffix: int = 0  # tokens decoded so far, T
    layers: list[LayerKVCache] = field(default_factory=list)

    def reorder(self, parents: Tensor) -> None:
        """Beam k of user b goes on from beam parents[b, k] (int64 [B, K']) of the step before. The prefix is shared and stays."""
        for layer in self.layers:
            if layer.suffix_key is not None and layer.suffix_value is not None:
                first = (
                    torch.arange(len(parents), device=parents.device)[:, None]
                    * layer.suffix_key.shape[1]
                )
                index = (first + parents).flatten()
                layer.suffix_key = (
                    layer.suffix_key.flatten(0, 1)
                    .index_select(0, index)
                    .unflatten(0, parents.shape)
                )
                layer.suffix_value = (
                    layer.suffix_value.flatten(0, 1)
                    .index_select(0, index)
                    .unflatten(0, parents.shape)
                )


class CoreAttention(torch.nn.Module):
    """Causal attention on [B, S, heads, head_dim] without dropout; Megatron hands on `attention_mask` unread, which carries the cache here.

    The batch comes first (Megatron's own layout has the sequence first): nothing but this module and the rotary table sees the difference, and
    no transpose of the residual stream is needed.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.index = layer_number - 1
        self.scale = config.softmax_scale  # None: 1 / sqrt(head_dim)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: KVCache | None, /, **_: Any
    ) -> Tensor:
        """query [B, S, heads, head_dim], key and value [B, S, heads_kv, head_dim] → [B, S, heads · head_dim].

        attention_mask: None in training, the cache in prefill (empty) and in decoding, where the S queries are the beams of a user.
        """
        cache = attention_mask
        if cache is not None and len(cache.layers) > self.index:
            return self._decode(query, key, value, cache.layers[self.index])
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            cache.layers.append(
                LayerKVCache(key.contiguous(), value.contiguous())
            )  # copies: the originals are views into queries, keys and values
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(2)

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerKVCache) -> Tensor:
        """One new token per beam, [B, K, heads, head_dim], against [the user's prefix] + [the beam's suffix and the token itself]."""
        if layer.suffix_key is None or layer.suffix_value is None:
            layer.suffix_key, layer.suffix_value = key.unsqueeze(2), value.unsqueeze(2)
        else:
            layer.suffix_key = torch.cat((layer.suffix_key, key.unsqueeze(2)), dim=2)
            layer.suffix_value = torch.cat((layer.suffix_value, value.unsqueeze(2)), dim=2)
        assert layer.prefix_key is not None and layer.prefix_value is not None
        batch, beams, heads, width = query.shape
        groups = key.shape[2]
        # b user, k beam, g key/value head, r query head of the group, s prefix position, t suffix position, d head_dim
        query = query.view(batch, beams, groups, heads // groups, width) * (
            self.scale if self.scale is not None else width**-0.5
        )
        by_group = query.permute(0, 2, 1, 3, 4).flatten(
            2, 3
        )  # b g kr d: one matrix product per user and group for the shared prefix
        over_prefix = (by_group @ layer.prefix_key.transpose(2, 3)).unflatten(
            2, (beams, -1)
        )  # b g k r s
        # the suffixes are a few tokens long and differ by beam: elementwise beats thousands of tiny matrix products
        over_suffix = (
            (query.float().unsqueeze(2) * layer.suffix_key.unsqueeze(4))
            .sum(-1)
            .permute(0, 3, 1, 4, 2)
        )  # b g k r t
        weights = torch.cat((over_prefix.float(), over_suffix), dim=-1).softmax(dim=-1)
        of_prefix, of_suffix = weights.split((over_prefix.shape[-1], over_suffix.shape[-1]), dim=-1)
        from_prefix = (
            (of_prefix.flatten(2, 3).to(value.dtype) @ layer.prefix_value)
            .unflatten(2, (beams, -1))
            .permute(0, 2, 1, 3, 4)
        )  # b k g r d
        from_suffix = (
            of_suffix.permute(0, 2, 4, 1, 3).unsqueeze(-1) * layer.suffix_value.unsqueeze(4)
        ).sum(2)  # b k g r d
        return (from_prefix + from_suffix).to(value.dtype).flatten(2)
