"""SASRec, the model behind the rewards and the results' SASRec row (METHOD.md §5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.sasrec.sharded_table import ItemShard, ItemTable
from ilrec_dist.data.dataset import ItemArray

INIT_STD = 0.02


class Block(nn.Module):
    """One pre-norm transformer layer with causal self-attention; the FFN is
    4 d wide.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, S, d] → [B, S, d]; with rows (int64 [R], flat in B·S) only
        those, [R, d].
        """
        batch, length, width = x.shape
        heads = (batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(self.attention_norm(x)).view(heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        if rows is not None:
            x, mixed = x.reshape(-1, width)[rows], mixed.view(-1, width)[rows]
        x = x + self.dropout(self.proj(mixed))
        out: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.ffn_norm(x)))))
        return out


class SASRec(nn.Module):
    """A causal transformer over item indices whose output layer is its item table.

    `known` (bool [num_items]) marks the items that occur in the sequences the model was
    trained on; the rewards give the others nothing. Where the table has several shards,
    the processes that hold them run one model: each computes the same queries.
    """

    known: Tensor

    def __init__(
        self,
        shard: ItemShard,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_history: int,
    ) -> None:
        super().__init__()
        self.max_history = max_history
        self.items = ItemTable(shard, hidden_size, INIT_STD)
        self.positions = nn.Embedding(max_history, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.register_buffer("known", torch.zeros(shard.num_items, dtype=torch.bool))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, config: CFConfig, shard: ItemShard) -> SASRec:
        return cls(
            shard,
            config.hidden_size,
            config.num_layers,
            config.num_heads,
            config.dropout,
            config.max_history,
        )

    @property
    def num_items(self) -> int:
        return self.items.shard.num_items

    @property
    def device(self) -> torch.device:
        return self.positions.weight.device

    def forward(self, items: Tensor) -> Tensor:
        """Item indices int64 [B, S] → queries fp32 [B, S, d].

        The items are chronological and padded on the right; S ≤ max_history. The query
        at s has seen items[:, : s + 1]; its inner product with an item's row of the
        table is the item's logit as the next one. Whatever stands to the right of s,
        padding included, cannot reach it, so no mask is needed.
        """
        return self.transform(self.items(items))

    def transform(self, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `forward`, from the items' vectors fp32 [B, S, d].

        With rows (int64 [R], flat in B·S) only the queries of those, [R, d].
        """
        # Scaled as in SASRec, so that the positions do not drown the small item vectors.
        scale = vectors.shape[-1] ** 0.5
        x = self.dropout(vectors * scale + self.positions.weight[: vectors.shape[1]])
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            # The last layer's feed-forward is most of its work, and few positions are queries.
            x = block(x, rows if layer == last else None)
        return cast(Tensor, self.norm(x))


# A history longer than max_history is read through windows that advance by half of it, in
# training and in scoring alike, so that one forward serves many targets and every target keeps
# at least half a window of context.


def window_stride(max_history: int) -> int:
    return max(1, max_history // 2)


def window_starts(positions: np.ndarray, max_history: int) -> np.ndarray:
    """Where the window of the target at each of `positions` begins: int64 [T].

    positions int64 [T], ≥ 1. The target's history is sequence[start : position], of 1
    to max_history items.
    """
    stride = window_stride(max_history)
    starts: np.ndarray = (np.maximum(positions - max_history, 0) + stride - 1) // stride * stride
    return starts


def pad_histories(items: ItemArray, starts: np.ndarray, lengths: np.ndarray) -> Tensor:
    """items[start : start + length] of each row, right-padded with item 0.

    Returns int64 [B, max(lengths)].
    """
    columns = np.arange(int(lengths.max(initial=1)))
    inside = columns < lengths[:, None]
    padded = np.where(inside, items[np.where(inside, starts[:, None] + columns, 0)], 0)
    return torch.from_numpy(padded.astype(np.int64))


@torch.no_grad()
def encode(
    model: SASRec,
    items: ItemArray,
    starts: np.ndarray,
    positions: np.ndarray,
    embed: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Queries fp32 [T, d] of T targets, each from the history before it (METHOD.md §5).

    items int32: all users' interactions; starts int64 [T]: where the target's user
    begins in it; positions int64 [T] ≥ 1: the target's position in that user's
    sequence; embed: item indices → vectors, where the table is kept outside the model.
    Targets of one window share one forward, and later items never change a bit of the
    result.
    """
    model.eval()
    embed = embed or model.items
    queries = torch.empty(len(positions), model.positions.embedding_dim, device=model.device)
    if len(positions) == 0:
        return queries
    begin = starts + window_starts(positions, model.max_history)
    history_lengths = starts + positions - begin
    windows, window_of = np.unique(begin, return_inverse=True)
    lengths = np.zeros(len(windows), dtype=np.int64)
    np.maximum.at(lengths, window_of, history_lengths)
    by_length = np.argsort(lengths, kind="stable")
    rank = np.empty_like(by_length)
    rank[by_length] = np.arange(len(by_length))
    # The targets in the order in which their windows are computed.
    order = np.argsort(rank[window_of], kind="stable")
    batch_starts = np.arange(0, len(windows) + batch_size, batch_size)
    bounds = np.searchsorted(rank[window_of][order], batch_starts)
    for index, first in enumerate(range(0, len(windows), batch_size)):
        batch = by_length[first : first + batch_size]
        padded = pad_histories(items, windows[batch], lengths[batch]).to(model.device)
        targets = order[bounds[index] : bounds[index + 1]]
        row = rank[window_of[targets]] - first
        flat = torch.from_numpy(row * padded.shape[1] + history_lengths[targets] - 1)
        queries[torch.from_numpy(targets).to(model.device)] = model.transform(
            embed(padded), flat.to(model.device)
        )
    return queries
