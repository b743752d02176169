"""A small data set whose catalogue has items that share a code tuple, and a backbone
for it.
"""

from __future__ import annotations

import numpy as np
import torch

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue, make_title_catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.model.gpt import Backbone

NUM_ITEMS, MAX_HISTORY = 60, 6
# There is dropout here, which evaluation must switch off.
SIZES = dict(
    num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=64, init_std=0.3, dropout=0.5
)
TIED = BackboneConfig(**SIZES)
UNTIED = BackboneConfig(**SIZES, tie_embeddings=False, position_embedding="rope")


def toy_catalogue() -> Catalogue:
    """60 items of three codes; several items share a tuple, some prefixes have one
    child.
    """
    rng = np.random.default_rng(5)
    codes = np.stack([rng.integers(0, size, NUM_ITEMS) for size in (5, 6, 7)], axis=1)
    codes[[7, 33, 20]] = codes[3]
    codes[[50, 11]] = codes[12]
    return make_catalogue(codes, (5, 6, 7))


def dataset_of(sequences: list[list[int]], num_items: int) -> InteractionDataset:
    """Users u0, u1, … with these items i0, i1, …, which have titles."""
    return InteractionDataset(
        np.concatenate(sequences).astype(np.int32),
        np.cumsum([0] + [len(sequence) for sequence in sequences]),
        [f"u{user}" for user in range(len(sequences))],
        [f"i{item}" for item in range(num_items)],
        [f"Item number {item}" for item in range(num_items)],
    )


def toy_data(num_users: int = 23) -> InteractionDataset:
    rng = np.random.default_rng(6)
    sequences = [rng.permutation(NUM_ITEMS)[: rng.integers(3, 12)] for _ in range(num_users)]
    return dataset_of([sequence.tolist() for sequence in sequences], NUM_ITEMS)


def toy_backbone(catalogue: Catalogue, config: BackboneConfig = TIED) -> Backbone:
    return Backbone(
        config, catalogue.vocab_size, (MAX_HISTORY + 1) * catalogue.depth - 1, seed=4
    ).eval()


@torch.no_grad()
def exhaustive_scores(
    backbone: Backbone, catalogue: Catalogue, trie: Trie, history: np.ndarray, scope: str
) -> np.ndarray:
    """float64 [num_items] Σ log p of every item after one history, each by a full
    forward pass.
    """
    depth, count = catalogue.depth, catalogue.num_items
    prefix = np.broadcast_to(catalogue.item_tokens(history).ravel(), (count, len(history) * depth))
    own = catalogue.item_tokens(np.arange(count))
    tokens = torch.from_numpy(np.concatenate([prefix, own[:, :-1]], axis=1).astype(np.int64))
    width = tokens.shape[1]
    rows = (torch.arange(count)[:, None] * width + torch.arange(width - depth, width)).flatten()
    logits = (backbone(tokens, rows).final.double() @ backbone.head_weight.double().T).view(
        count, depth, -1
    )
    total = np.zeros(count)
    for item in range(count):
        for p in range(depth):
            indptr, children, _ = trie.children(p, trie.item_node(p, np.array([item])))
            candidates = (
                torch.from_numpy(children)
                if scope == "valid_next"
                else torch.arange(catalogue.vocab_size)
            )
            total[item] += float(
                logits[item, p, own[item, p]] - logits[item, p, candidates].logsumexp(0)
            )
    return total


# Text tokens of the toy titles.
PIECES = 9


def toy_titles() -> Catalogue:
    rng = np.random.default_rng(8)
    numbers = np.full((NUM_ITEMS, 5), -1, np.int32)
    for title, length in zip(numbers, rng.integers(1, 5, NUM_ITEMS), strict=True):
        title[:length], title[length] = rng.integers(1, 1 + PIECES, length), 0
    return make_title_catalogue(numbers, ["<end>", *"abcdefghi"])
