"""One fold's scorer: its SASRec and its item vectors in code order; of a large catalogue on disk, with nearest-item indexes and cell moments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilrec_dist.cf.rewards.ann import build_index, load_index, save_index
from ilrec_dist.cf.rewards.cell_moments import CellMoments, cell_moments
from ilrec_dist.cf.sasrec.checkpoint import checked_file, load_cf
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie

PREFIX_ITEMS = 16_384  # prefixes of up to so many items are scanned, which costs no more than estimating them from their children's moments
VALUES_AT_ONCE = 1 << 19  # fp32 gathered at once: 2 MiB, so that the memory is warm


@dataclass(frozen=True)
class LargeCatalogue:
    """What replaces the scan of the whole catalogue: per shard an index of the known items, and moments of the cells of each depth."""

    shards: list[tuple[int, int]]  # first-level nodes [start, stop) of each shard
    known: list[np.ndarray]  # per shard: code-order position of each id of its index, int32
    indexes: list[Any]
    moments: list[
        CellMoments
    ]  # of the nodes of depth 1, 2, …; below depth 1 only of the children of long prefixes


@dataclass(frozen=True)
class FoldScorer:
    """Scores any range of the code-ordered catalogue with one fold's model."""

    vectors: torch.Tensor  # [n, d], fp32, or fp16 where the index is an approximate one
    bias: (
        torch.Tensor | None
    )  # fp32 [n], −inf where the model knows no such item; None when it knows all
    large: LargeCatalogue | None = None

    def scores(self, queries: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
        """Logits of the code-order positions [start, stop) for queries fp32 [t, d], into out fp32 [t, stop − start]."""
        torch.mm(queries, self.vectors[start:stop].float().t(), out=out)
        if self.bias is not None:
            out += self.bias[start:stop]

    def embed(self, position: np.ndarray, items: torch.Tensor) -> torch.Tensor:
        """Vectors fp32 [B, S, d] of item indices int64 [B, S]; `position` gives their code-order positions."""
        rows = torch.from_numpy(position[items.numpy()].astype(np.int64))
        return self.vectors.index_select(0, rows.view(-1)).view(*rows.shape, -1).float()

    def scores_at(self, queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [t, k] of the code-order positions int64 [t, k], each row for its own query."""
        scores = torch.empty(positions.shape)
        step = max(1, VALUES_AT_ONCE // max(1, positions.shape[1] * self.vectors.shape[1]))
        for begin in range(0, len(positions), step):
            part = slice(begin, begin + step)
            picked = (
                self.vectors.index_select(0, positions[part].reshape(-1))
                .float()
                .view(*positions[part].shape, -1)
            )
            torch.bmm(picked, queries[part, :, None], out=scores[part, :, None])
        return scores if self.bias is None else scores + self.bias[positions]


def in_memory(table: torch.Tensor, known: torch.Tensor, catalogue: Catalogue) -> FoldScorer:
    """Of a model's table fp32 [num_items, d] and known bool [num_items], both by item index."""
    order = torch.from_numpy(catalogue.items.astype(np.int64))
    return FoldScorer(table.detach()[order].contiguous(), _bias(known[order]))


def _bias(known: torch.Tensor) -> torch.Tensor | None:
    return None if bool(known.all()) else torch.zeros(len(known)).masked_fill_(~known, -torch.inf)


def shard_nodes(trie: Trie, shards: int) -> list[tuple[int, int]]:
    """Cut the first-level nodes into ranges of about equally many items. Raises UserError when they are too few."""
    starts = trie.node_start[1]
    cuts = np.unique(np.searchsorted(starts, np.linspace(0, starts[-1], shards + 1)))
    cuts[-1] = len(starts) - 1
    if len(np.unique(cuts)) != shards + 1:
        raise UserError(
            f"cf.reward_shards {shards}: the {len(starts) - 1} first codes do not fill so many shards; choose fewer"
        )
    return [(int(a), int(b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def write_store(
    folder: Path,
    table: torch.Tensor,
    known: torch.Tensor,
    trie: Trie,
    kind: str,
    shards: int = 1,
    prefix_items: int = PREFIX_ITEMS,
) -> None:
    """Write one fold's store into a new folder: vectors.npy (code order), known.npy, index-S.faiss per shard, moments-P.npz per depth.

    table [num_items, d] and known bool [num_items] by item index; kind as of `ann.build_index`. Vectors are rounded to fp16, except for the flat
    index, which is there to be exact.
    """
    folder.mkdir()
    order = trie.catalogue.items
    known_here = known.numpy()[order]
    kept = np.float32 if kind == "flat" else np.float16
    vectors = np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=kept, shape=(len(order), table.shape[1])
    )
    for start in range(0, len(order), 1 << 18):
        vectors[start : start + (1 << 18)] = (
            table[torch.from_numpy(order[start : start + (1 << 18)].astype(np.int64))]
            .detach()
            .numpy()
        )
    vectors.flush()
    np.save(folder / "known.npy", known_here)
    ranges = shard_nodes(trie, shards)
    np.save(folder / "shards.npy", np.array(ranges))
    for number, (first, stop) in enumerate(ranges):
        positions = _known_positions(known_here, trie, first, stop)
        save_index(build_index(kind, vectors, positions), folder / f"index-{number}.faiss")
    tensor, mask = torch.from_numpy(np.asarray(vectors)), torch.from_numpy(known_here)
    for depth, nodes in enumerate(moment_nodes(trie, prefix_items), start=1):
        cell_moments(tensor, mask, trie.node_start[depth], nodes).save(
            folder / f"moments-{depth}.npz"
        )


def moment_nodes(trie: Trie, prefix_items: int) -> list[np.ndarray]:
    """Per depth 1, 2, …: the nodes whose moments a reward may need. All of depth 1; below, the children of prefixes of over `prefix_items` items."""
    wanted = [np.arange(trie.num_nodes(1))]
    for depth in range(1, trie.depth):
        long = np.diff(trie.node_start[depth]) > prefix_items
        if not long.any():
            break
        wanted.append(np.flatnonzero(np.repeat(long, np.diff(trie.child_start[depth]))))
    return wanted


def open_store(folder: Path, trie: Trie, shard: int | None = None) -> FoldScorer:
    """Map what `write_store` wrote; of the indexes only that of `shard`, None: all."""
    vectors = torch.from_numpy(
        np.lib.format.open_memmap(folder / "vectors.npy", mode="c")
    )  # copy-on-write: torch wants writable memory
    known = np.load(folder / "known.npy")
    ranges = [(int(a), int(b)) for a, b in np.load(folder / "shards.npy")]
    chosen = range(len(ranges)) if shard is None else [shard]
    moments: list[CellMoments] = []
    while (path := folder / f"moments-{len(moments) + 1}.npz").exists():
        moments.append(CellMoments.load(path))
    large = LargeCatalogue(
        [ranges[s] for s in chosen],
        [_known_positions(known, trie, *ranges[s]) for s in chosen],
        [load_index(folder / f"index-{s}.faiss") for s in chosen],
        moments,
    )
    return FoldScorer(vectors, _bias(torch.from_numpy(known)), large)


def _known_positions(known: np.ndarray, trie: Trie, first: int, stop: int) -> np.ndarray:
    low, high = int(trie.node_start[1][first]), int(trie.node_start[1][stop])
    return (np.flatnonzero(known[low:high]) + low).astype(np.int32)


def load_scorer(
    cf_folder: str | Path, which: str, trie: Trie, shard: int | None, code_order: dict[str, Any]
) -> tuple[SASRec, FoldScorer]:
    """A fold's model and its scorer: from the store that the manifest `code_order` names, or in memory. Every file read is checked against its hash."""
    stored = [name for name in code_order["sha256"] if name.startswith(f"{which}/")]
    if not stored:
        model = load_cf(cf_folder, which)
        return model, in_memory(model.items.weight, model.known, trie.catalogue)
    folder = Path(cf_folder) / CODE_ORDER
    for name in stored:
        if shard is None or not name.endswith(".faiss") or name.endswith(f"index-{shard}.faiss"):
            checked_file(folder, name, code_order)
    return load_cf(cf_folder, which, table=False), open_store(folder / which, trie, shard)
