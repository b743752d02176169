"""The core attention of every layer, and the contexts that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from ilrec_dist.model.branches import BranchedSequences

# The queries that attend together in `_causal_products`, and the scores that are there at once.
QUERY_BLOCK, BLOCK_SCORES = 64, 1 << 19


@dataclass
class LayerKVCache:
    """One layer's keys and values: a prefix per user and a suffix per beam.

    prefix_key and prefix_value are [B, heads_kv, S, head_dim]; suffix_key and
    suffix_value are [B, K, T, heads_kv, head_dim], T the number of tokens decoded so
    far, and None before the first one.
    """

    prefix_key: Tensor
    prefix_value: Tensor
    suffix_key: Tensor | None = None
    suffix_value: Tensor | None = None


@dataclass
class KVCache:
    """The keys and values of a batch of users' prefixes.

    `Backbone.prefill` fills it and `Backbone.decode` extends it, both in place.
    """

    # S, the number of tokens of the longest prefix.
    prefix: int
    num_layers: int
    # T, the number of tokens decoded so far.
    suffix: int = 0
    layers: list[LayerKVCache] = field(default_factory=list)
    # The tokens of each prefix, int64 [B], and which of the S positions are padding behind it,
    # bool [B, S]. None where all prefixes have S tokens.
    lengths: Tensor | None = None
    padding: Tensor | None = None

    def branch(self) -> KVCache:
        """A cache that goes on from the same prefixes, whatever this one decodes.

        It shares their keys and values, and has no suffix.
        """
        prefixes = [LayerKVCache(layer.prefix_key, layer.prefix_value) for layer in self.layers]
        return replace(self, suffix=0, layers=prefixes)

    def reads_ends(self, layer: int) -> bool:
        """Whether this layer, counted from 0, comes next and is the last of a prefill.

        Of its output only the prefixes' last tokens are read.
        """
        return layer == len(self.layers) == self.num_layers - 1

    def at_ends(self, states: Tensor) -> Tensor:
        """[B, S, …] → [B, 1, …], those of each prefix's last token."""
        if self.lengths is None:
            return states[:, -1:]
        users = torch.arange(len(states), device=states.device)
        return states[users, self.lengths - 1].unsqueeze(1)

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of user b continue beam parents[b, k], int64 [B, K'].

        The prefix is shared by a user's beams and stays as it is.
        """
        for layer in self.layers:
            if layer.suffix_key is None or layer.suffix_value is None:
                continue
            users = torch.arange(len(parents), device=parents.device)[:, None]
            index = (users * layer.suffix_key.shape[1] + parents).flatten()
            layer.suffix_key = _select_beams(layer.suffix_key, index, parents.shape)
            layer.suffix_value = _select_beams(layer.suffix_value, index, parents.shape)


def _select_beams(suffix: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    return suffix.flatten(0, 1).index_select(0, index).view(*shape, *suffix.shape[2:])


class PackedSequences:
    """The boundaries of the samples that are concatenated in one row of tokens [1, T].

    Attention stays within a sample and positions restart at 0 (METHOD.md §10, packing),
    so a packed batch gives what its samples give one by one. Linear layers see no
    padding at all. Attention runs on padded batches of samples of similar length:
    within a batch the longest sample is less than twice as long as the shortest. The
    batches are planned here, from lengths on the host, so that no layer waits for the
    device.

    lengths: tokens of each sample, all positive; T is their sum.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        sizes = torch.as_tensor(lengths, dtype=torch.int64)
        if len(sizes) == 0 or int(sizes.min()) < 1:
            raise ValueError(
                "packed sequences need at least one sample, each of at least one token"
            )
        starts = sizes.cumsum(0) - sizes
        self.num_tokens = int(sizes.sum())
        self.max_length = int(sizes.max())
        self.positions = (torch.arange(self.num_tokens) - starts.repeat_interleave(sizes)).to(
            device
        )  # [T]
        # The token at each position of each padded batch, [n, longest]. A position beyond the
        # end of a sample repeats its last token, which causal attention hides from the tokens
        # before it.
        self.batches: list[Tensor] = []
        # The position of each token in the concatenated batches, [T].
        self.position_in_batches = torch.empty(self.num_tokens, dtype=torch.int64)
        offset = 0
        bits = [length.bit_length() for length in sizes.tolist()]
        octaves = torch.tensor(bits)
        for octave in sorted(set(bits)):
            members = (octaves == octave).nonzero().flatten()
            longest = int(sizes[members].max())
            position = torch.arange(longest)
            inside = position < sizes[members, None]
            tokens = starts[members, None] + torch.minimum(position, sizes[members, None] - 1)
            positions = offset + torch.arange(tokens.numel()).view_as(tokens)
            self.position_in_batches[tokens[inside]] = positions[inside]
            self.batches.append(tokens.to(device))
            offset += tokens.numel()
        self.position_in_batches = self.position_in_batches.to(device)


# What an attention layer is told besides queries, keys and values: None is plain causal attention.
AttentionContext = KVCache | PackedSequences | BranchedSequences | None


class CoreAttention(torch.nn.Module):
    """Causal attention without dropout on [B, S, heads, head_dim].

    The batch comes first, whereas Megatron's own layout has the sequence first. Only
    this module and the rotary table see the difference, and the residual stream needs
    no transpose.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.index = layer_number - 1
        # None stands for 1 / sqrt(head_dim).
        self.scale = config.softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> Tensor:
        """Attend: query [B, S, heads, head_dim] → [B, S, heads · head_dim].

        key and value are [B, S, heads_kv, head_dim]. An empty cache (prefill) stores
        them, and the last layer gives the prefixes' last tokens alone, [B, 1, heads ·
        head_dim]. With a filled one (decoding) the S queries are the beams of a user,
        one new token each.
        """
        if isinstance(context, PackedSequences):
            return self._packed(query, key, value, context)
        if isinstance(context, BranchedSequences):
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            return self._attend(query, key, value, context.mask).transpose(1, 2).flatten(2)
        if context is not None and len(context.layers) > self.index:
            layer = context.layers[self.index]
            return self._decode(query, key, value, layer, context.padding)
        heads, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if context is not None:
            reads_ends = context.reads_ends(self.index)
            # Copies, because the originals are views into one tensor with the queries.
            context.layers.append(LayerKVCache(key.contiguous(), value.contiguous()))
            if reads_ends:
                ends = context.at_ends(query).transpose(1, 2)
                return self._to_prefixes(ends, key, value, context.padding)
        return self._causal(heads, key, value).transpose(1, 2).flatten(2)

    def _to_prefixes(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Attend from one token to all of its prefix, query [B, heads, 1, head_dim]."""
        if padding is None:
            mask = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
        else:
            mask = ~padding[:, None, None]
        attended = _attention(query, key, value, mask, self.scale)
        return attended.transpose(1, 2).flatten(2)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention on [B, heads, S, head_dim]."""
        return self._attend(query, key, value, None)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention on [B, heads, S, head_dim]:
        causal, or as the mask [B, 1, S, S] says.
        """
        if query.is_cuda or query.dtype == torch.float32:
            return _attention(query, key, value, mask, self.scale)
        if query.requires_grad:
            attended: Tensor = _InFP32.apply(  # type: ignore[no-untyped-call]
                query, key, value, mask, self.scale
            )
            return attended
        if mask is None:
            return _causal_products(query, key, value, self.scale)
        return _attention(query, key, value, mask, self.scale)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        """Causal attention within each sample of a row, [1, T, heads, head_dim]."""
        outputs = []
        for tokens in packed.batches:
            index = tokens.flatten()
            parts = (
                part[0].index_select(0, index).view(*tokens.shape, *part.shape[2:]).transpose(1, 2)
                for part in (query, key, value)
            )
            outputs.append(self._causal(*parts).transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, packed.position_in_batches)[None]

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: LayerKVCache,
        padding: Tensor | None,
    ) -> Tensor:
        """Attend from one new token per beam, [B, K, heads, head_dim].

        It sees the user's prefix and its beam's suffix, whose last token it is. padding
        bool [B, S] marks what of the prefix is hidden.
        """
        if layer.suffix_key is None or layer.suffix_value is None:
            layer.suffix_key, layer.suffix_value = key.unsqueeze(2), value.unsqueeze(2)
        else:
            layer.suffix_key = torch.cat((layer.suffix_key, key.unsqueeze(2)), dim=2)
            layer.suffix_value = torch.cat((layer.suffix_value, value.unsqueeze(2)), dim=2)
        batch, beams, heads, width = query.shape
        groups = key.shape[2]
        # In the shapes below, b is a user, k a beam, g a key/value head, r a query head of that
        # group, s a prefix position, t a suffix position and d the head's dimension.
        query = query.view(batch, beams, groups, heads // groups, width) * (
            self.scale if self.scale is not None else width**-0.5
        )
        # All beams of a user share one matrix product per group with the prefix.
        by_group = query.permute(0, 2, 1, 3, 4).flatten(2, 3)  # b g kr d
        prefix_scores = by_group @ layer.prefix_key.transpose(2, 3)
        prefix_scores = prefix_scores.view(batch, groups, beams, heads // groups, -1)  # b g k r s
        if padding is not None:
            hidden = padding[:, None, None, None]
            prefix_scores = prefix_scores.masked_fill(hidden, -torch.inf)
        # Suffixes are a few tokens long and differ by beam, so elementwise products beat
        # thousands of tiny matrix products.
        suffix_scores = (query.float().unsqueeze(2) * layer.suffix_key.unsqueeze(4)).sum(-1)
        suffix_scores = suffix_scores.permute(0, 3, 1, 4, 2)  # b g k r t
        weights = torch.cat((prefix_scores.float(), suffix_scores), dim=-1).softmax(dim=-1)
        prefix_length = prefix_scores.shape[-1]
        prefix_weights, suffix_weights = weights[..., :prefix_length], weights[..., prefix_length:]
        prefix_out = prefix_weights.flatten(2, 3).to(value.dtype) @ layer.prefix_value
        prefix_out = prefix_out.view(batch, groups, beams, heads // groups, width)
        prefix_out = prefix_out.permute(0, 2, 1, 3, 4)  # b k g r d
        suffix_weights = suffix_weights.permute(0, 2, 4, 1, 3).unsqueeze(-1)  # b k t g r 1
        suffix_out = (suffix_weights * layer.suffix_value.unsqueeze(4)).sum(2)  # b k g r d
        output: Tensor = (prefix_out + suffix_out).to(value.dtype).flatten(2)
        return output


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _causal_products(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention by plain products, a block of queries of some sequences at a
    time, with the softmax in fp32.

    In bf16 on a CPU it takes .6 to .8 of the time of torch's own, which is no faster
    there than in fp32.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scale = width**-0.5 if scale is None else scale
    # In the shapes below, g is a key/value head and r a query head of that group.
    shape = (batch, groups, heads // groups, length, width)
    by_group = query.view(shape)  # b g r s d
    output = query.new_empty(batch, length, heads, width).transpose(1, 2)
    output_by_group = output.view(shape)
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        block = slice(first, last)
        later = torch.ones(last - first, last, dtype=torch.bool).triu_(first + 1)
        count = max(1, BLOCK_SCORES // (heads * (last - first) * last))
        for user in range(0, batch, count):
            users = slice(user, user + count)
            queries = by_group[users, :, :, block].flatten(2, 3)  # b g rs d
            scores = (queries @ key[users, :, :last].transpose(2, 3)).float().mul_(scale)
            scores = scores.view(-1, *shape[1:3], last - first, last).masked_fill_(
                later, -torch.inf
            )
            weights = scores.softmax(-1).to(value.dtype).flatten(2, 3)
            attended = weights @ value[users, :, :last]
            output_by_group[users, :, :, block] = attended.view(
                -1, *shape[1:3], last - first, width
            )
    return output


class _InFP32(torch.autograd.Function):
    """Attention in fp32 of what comes and goes in bf16.

    On a CPU the backward pass in bf16 takes several times as long as the one in fp32.
    The copies in fp32 are made again there, and so is the output of those.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        output = _attention(query.float(), key.float(), value.float(), mask, scale)
        return output.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *heads, mask = ctx.saved_tensors
        query, key, value = copies = [part.float().requires_grad_() for part in heads]
        with torch.enable_grad():
            output = _attention(query, key, value, mask, ctx.scale)
        gradients = torch.autograd.grad(output, copies, grad.float())
        return *(gradient.to(grad.dtype) for gradient in gradients), None, None
