"""A plain single-process decoder over semantic IDs checks the system's numbers and its
speed.

OMP_NUM_THREADS=1 python benchmarks/plain_baseline.py
--data PATH/instruments --epochs 15

Nothing of `ilrec_dist` is used: it reads the LC-Rec triple, trains a pre-norm
GPT-2 on every item after a user's first, and decodes with a constrained beam
search, so that an error in the system cannot hide in the check.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import command_line, describe_machine, machine_line, write_figures
from torch import Tensor, nn

# Codes per level. A token is 1 + level * 256 + code, and token 0 is padding.
LEVEL_SIZE = 256
WARM_UP_STEPS = 300
# The rank of a target that the beam search does not return.
NOT_RANKED = 10**9


@dataclass
class Triple:
    """Histories, and the trie of the items' code tuples as one dense table."""

    # Item ids 0 … n-1 of each user, chronological.
    sequences: list[np.ndarray]
    tokens: np.ndarray  # int64 [items, C]
    # int32 [nodes, V]: the child of (node, token), -1 where no item goes on so. Node 0 is the root.
    child: Tensor
    # int64 [items, C + 1]: the item's node at every depth.
    item_nodes: np.ndarray
    vocab_size: int


def read_triple(folder: Path, index: Path | None) -> Triple:
    """Read NAME.inter.json and NAME.index.json, or `index`, of an LC-Rec folder.

    Items must be numbered from 0.
    """
    (inter_path,) = folder.glob("*.inter.json")
    index = index or inter_path.with_name(inter_path.name.replace(".inter.", ".index."))
    sequences = [
        np.array(items, dtype=np.int64) for items in json.loads(inter_path.read_text()).values()
    ]
    codes_of = json.loads(index.read_text())
    codes = np.array(
        [
            [int(code.strip("<>").split("_")[1]) for code in codes_of[str(item)]]
            for item in range(len(codes_of))
        ]
    )
    depth = codes.shape[1]
    tokens = 1 + np.arange(depth) * LEVEL_SIZE + codes
    vocab_size = 1 + depth * LEVEL_SIZE
    nodes: dict[tuple[int, ...], int] = {(): 0}
    item_nodes = np.zeros((len(tokens), depth + 1), dtype=np.int64)
    edges = []
    for item, row in enumerate(tokens.tolist()):
        for level in range(depth):
            prefix = tuple(row[: level + 1])
            if prefix not in nodes:
                nodes[prefix] = len(nodes)
                edges.append((item_nodes[item, level], row[level], nodes[prefix]))
            item_nodes[item, level + 1] = nodes[prefix]
    child = torch.full((len(nodes), vocab_size), -1, dtype=torch.int32)
    parents, edge_tokens, children = (torch.tensor(column) for column in zip(*edges, strict=True))
    child[parents, edge_tokens] = children.int()
    return Triple(sequences, tokens, child, item_nodes, vocab_size)


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> list[Tensor]:
        """[B, S, d] -> q, k, v, each [B, heads, S, d / heads]."""
        return [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        ]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        fed: Tensor = self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return x + fed

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.split(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past is None)
        return self.finish(x, attended), (k, v)


class Decoder(nn.Module):
    """Pre-norm GPT-2 with learned positions and a tied head."""

    def __init__(
        self,
        vocab_size: int,
        positions: int,
        hidden: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.embed, self.position = (
            nn.Embedding(vocab_size, hidden),
            nn.Embedding(positions, hidden),
        )
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(layers))
        self.norm, self.dropout = nn.LayerNorm(hidden), nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = (
                    0.02 / math.sqrt(2 * layers)
                    if name.endswith(("out.weight", "down.weight"))
                    else 0.02
                )
                nn.init.normal_(parameter, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """int64 [B, S] -> final-normed hidden states [B, S, d], every block's keys and
        values.
        """
        x = self.dropout(self.embed(tokens) + self.position.weight[: tokens.shape[1]])
        cache = []
        for block in self.blocks:
            x, kv = block(x)
            cache.append(kv)
        return self.norm(x), cache

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed.weight.T


def windows(sequence: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Windows of at most `length` items, half overlapping.

    With each goes how many of its first items are context and not targets.
    """
    yield sequence[:length], 1
    stride = length // 2
    for start in range(stride, len(sequence) - length + stride, stride):
        yield sequence[start : start + length], length - stride


def training_rows(data: Triple, history: int) -> list[tuple[np.ndarray, int]]:
    return [
        window
        for sequence in data.sequences
        for window in windows(sequence[:-2], history + 1)
        if len(window[0]) > window[1]
    ]


def batches(
    rows: list[tuple[np.ndarray, int]], size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Rows of like length together (random within a length), batches in
    random order.
    """
    lengths = np.array([len(items) for items, _ in rows])
    order = rng.permutation(len(rows))
    order = order[np.argsort(lengths[order], kind="stable")]
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups


def batch_loss(
    model: Decoder, data: Triple, rows: list[tuple[np.ndarray, int]], scope: str
) -> Tensor:
    """Mean cross-entropy over the tokens of all target items of a batch."""
    depth = data.tokens.shape[1]
    width = max(len(items) for items, _ in rows)
    tokens = np.zeros((len(rows), width, depth), dtype=np.int64)
    nodes = np.zeros((len(rows), width, depth), dtype=np.int64)
    is_target = np.zeros((len(rows), width, depth), dtype=bool)
    for row, (items, context) in enumerate(rows):
        tokens[row, : len(items)] = data.tokens[items]
        nodes[row, : len(items)] = data.item_nodes[items, :depth]
        is_target[row, context : len(items)] = True
    flat, chosen = (
        torch.from_numpy(tokens).flatten(1),
        torch.from_numpy(is_target).flatten(1)[:, 1:],
    )
    hidden, _ = model(flat[:, :-1])
    logits = model.logits(hidden[chosen])
    if scope == "valid_next":
        row_nodes = torch.from_numpy(nodes).flatten(1)[:, 1:][chosen]
        logits = logits.masked_fill(data.child[row_nodes] < 0, float("-inf"))
    else:
        # Padding is not a token of any item.
        logits[:, 0] = float("-inf")
    return F.cross_entropy(logits, flat[:, 1:][chosen])


@torch.no_grad()
def beam_search(
    model: Decoder,
    data: Triple,
    histories: np.ndarray,
    seen: list[np.ndarray] | None,
    beam: int,
    scope: str,
) -> Tensor:
    """Histories of one length, int64 [B, h] -> leaf nodes int64 [B, beam], best first.

    They are -1 where fewer exist. `seen` (per user, item ids) removes
    those items: a node is closed once all its items are seen.
    """
    users, depth = len(histories), data.tokens.shape[1]
    closed = torch.zeros(users, len(data.child), dtype=torch.bool)
    if seen is not None:
        sizes = torch.from_numpy(np.bincount(data.item_nodes.ravel(), minlength=len(data.child)))
        for user, items in enumerate(seen):
            count = torch.from_numpy(
                np.bincount(data.item_nodes[items].ravel(), minlength=len(data.child))
            )
            closed[user] = count == sizes
    hidden, cache = model(torch.from_numpy(data.tokens[histories].reshape(users, -1)))
    hidden = hidden[:, -1:]
    length = histories.shape[1] * depth
    nodes, scores = torch.zeros(users, 1, dtype=torch.long), torch.zeros(users, 1)
    ancestors = torch.zeros(users, 0, 0, dtype=torch.bool)
    for level in range(depth):
        logits = model.logits(hidden)
        children = data.child[nodes.clamp(min=0)].long()
        if scope == "valid_next":
            log_p = logits.masked_fill(children < 0, float("-inf")).log_softmax(-1)
        else:
            log_p = logits.index_fill(-1, torch.tensor([0]), float("-inf")).log_softmax(-1)
        excluded = (children < 0) | (nodes < 0)[..., None]
        excluded |= closed.gather(1, children.clamp(min=0).flatten(1)).view_as(excluded)
        total = (scores[..., None] + log_p.masked_fill(excluded, float("-inf"))).flatten(1)
        scores, picked = total.topk(min(beam, total.shape[1]), dim=1)
        parents, tokens = picked // data.vocab_size, picked % data.vocab_size
        nodes = children.flatten(1).gather(1, picked).masked_fill(scores == float("-inf"), -1)
        if level == depth - 1:
            return nodes
        # Every beam sees its user's history, its own ancestors and itself; all beams' tokens lie
        # side by side in the cache.
        width = tokens.shape[1]
        itself = torch.eye(width, dtype=torch.bool).expand(users, -1, -1)
        if level:
            ancestors = ancestors.gather(1, parents[..., None].expand(-1, -1, ancestors.shape[2]))
            ancestors = torch.cat([ancestors, itself], 2)
        else:
            ancestors = itself
        mask = torch.cat([torch.ones(users, width, length, dtype=torch.bool), ancestors], 2)[
            :, None
        ]
        x = model.embed(tokens) + model.position.weight[length + level]
        for number, block in enumerate(model.blocks):
            x, cache[number] = block(x, mask, cache[number])
        hidden = model.norm(x)
    raise AssertionError("depth is at least 1")


def evaluate(
    model: Decoder, data: Triple, users: np.ndarray, args: argparse.Namespace, last: int = 1
) -> dict[str, float]:
    """Hit and NDCG at 1, 5, 10 of the item `last` from the end.

    Items that share a code tuple fill ranks in id order.
    """
    model.eval()
    groups: dict[int, list[int]] = {}
    for item, leaf in enumerate(data.item_nodes[:, -1].tolist()):
        groups.setdefault(leaf, []).append(item)
    by_length: dict[int, list[int]] = {}
    for user in users.tolist():
        by_length.setdefault(min(args.history, len(data.sequences[user]) - last), []).append(user)
    ranks = []
    for length, members in sorted(by_length.items()):
        for start in range(0, len(members), args.eval_batch):
            chunk = members[start : start + args.eval_batch]
            pasts = [data.sequences[user][:-last] for user in chunk]
            seen = pasts if args.exclude_seen else None
            leaves = beam_search(
                model,
                data,
                np.stack([past[-length:] for past in pasts]),
                seen,
                args.beam,
                args.softmax,
            )
            for user, past, row in zip(chunk, pasts, leaves.tolist(), strict=True):
                skip = set(past.tolist()) if args.exclude_seen else set()
                ranked = [
                    item for leaf in row if leaf >= 0 for item in groups[leaf] if item not in skip
                ]
                target = int(data.sequences[user][-last])
                ranks.append(ranked.index(target) if target in ranked else NOT_RANKED)
    model.train()
    rank = np.array(ranks)
    return {f"hit@{k}": float((rank < k).mean()) for k in (1, 5, 10)} | {
        f"ndcg@{k}": float(np.where(rank < k, 1 / np.log2(rank + 2.0), 0).mean()) for k in (5, 10)
    }


def cosine_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up, then a cosine to 0 at `total_steps`."""

    def factor(step: int) -> float:
        if step < WARM_UP_STEPS:
            return (step + 1) / WARM_UP_STEPS
        progress = (step - WARM_UP_STEPS) / max(1, total_steps - WARM_UP_STEPS)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    model: Decoder, data: Triple, validation_users: np.ndarray, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train all epochs; the printed record of each, with the validation where there are
    users.
    """
    rng = np.random.default_rng(args.seed)
    rows = training_rows(data, args.history)
    steps_per_epoch = math.ceil(len(rows) / args.batch)
    print(f"{len(rows)} rows, {steps_per_epoch} steps an epoch", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = cosine_schedule(optimizer, steps_per_epoch * (args.schedule_epochs or args.epochs))
    epochs = []
    for epoch in range(args.epochs):
        start, start_cpu, losses = time.perf_counter(), time.process_time(), []
        for group in batches(rows, args.batch, rng):
            loss = batch_loss(model, data, [rows[row] for row in group], args.softmax)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
            "loss": float(np.mean(losses)),
        }
        if len(validation_users):
            record["validation"] = evaluate(model, data, validation_users, args, last=2)
        epochs.append(record)
        print(json.dumps(record), flush=True)
    return epochs


def parse_arguments() -> argparse.Namespace:
    parser = command_line(__doc__, None)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with NAME.inter.json and NAME.index.json"
    )
    parser.add_argument("--index", type=Path, help="another NAME.index.json")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--schedule-epochs",
        type=int,
        help="epochs the cosine is laid out for, where fewer are run (default: --epochs)",
    )
    parser.add_argument(
        "--softmax",
        choices=["all", "valid_next"],
        default="all",
        help="softmax scope of training and decoding",
    )
    parser.add_argument("--history", type=int, default=20, help="items of context")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--beam", type=int, default=20)
    parser.add_argument(
        "--exclude-seen",
        action="store_true",
        help="never return items of the history (default: they are returned)",
    )
    parser.add_argument(
        "--validation-users",
        type=int,
        default=0,
        help="users of the validation after each epoch; 0: none",
    )
    parser.add_argument(
        "--test-users",
        type=int,
        default=0,
        help="first users of a seeded permutation; 0: all, -1: none",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    machine = describe_machine(threads=args.threads)
    print(machine_line(machine))
    data = read_triple(args.data, args.index)
    model = Decoder(data.vocab_size, (args.history + 1) * data.tokens.shape[1] - 1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(data.sequences)} users, {len(data.tokens)} items, {parameters:,} parameters")
    order = np.random.default_rng(0).permutation(len(data.sequences))
    result: dict[str, Any] = {
        "machine": machine,
        "dataset": args.data.name,
        "parameters": parameters,
        "arguments": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
        },
        "epochs": train(model, data, order[: args.validation_users], args),
    }
    if args.test_users >= 0:
        start = time.perf_counter()
        users = order[: args.test_users] if args.test_users else order
        result["test"] = evaluate(model, data, users, args) | {
            "users": len(users),
            "seconds": time.perf_counter() - start,
        }
        print(json.dumps(result["test"]), flush=True)
    write_figures(args.json, result)


if __name__ == "__main__":
    main()
