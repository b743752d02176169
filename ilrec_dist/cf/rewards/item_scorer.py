"""One fold's item scorer: its item vectors in code order (METHOD.md §5).

For a large catalogue also nearest-item indexes and cell moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilrec_dist.cf.rewards.ann import build_ann_index, load_ann_index, save_ann_index
from ilrec_dist.cf.rewards.cell_moments import CellMoments, cell_moments
from ilrec_dist.cf.sasrec.checkpoint import checked_files, load_cf, require_finite
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie

# Prefixes of up to so many items are scanned, which costs no more than estimating them from
# their children's moments.
PREFIX_ITEMS = 16_384
# The fp32 values that are gathered in one step: 2 MiB, so that the memory stays in the cache.
GATHER_ELEMENTS = 1 << 19
# Item vectors that are copied in one step.
COPY_ROWS = 1 << 18


@dataclass(frozen=True)
class LargeCatalogue:
    """What replaces the scan of the whole catalogue."""

    # First-level nodes [start, stop) of each shard.
    shards: list[tuple[int, int]]
    # Per shard: the code-order position of each id of its index, int32.
    known: list[np.ndarray]
    # Per shard: the FAISS index of its known items.
    indexes: list[Any]
    # Of the nodes of depth 1, 2, …; below depth 1 only of the children of long prefixes.
    moments: list[CellMoments]


@dataclass(frozen=True)
class ItemScorer:
    """Scores any range of the code-ordered catalogue with one fold's item vectors."""

    # [n, d], fp32, or fp16 where the index is an approximate one.
    vectors: torch.Tensor
    # fp32 [n], −inf where the model does not know the item; None when it knows all.
    bias: torch.Tensor | None
    large: LargeCatalogue | None = None

    def scores(self, queries: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
        """Write the logits of code-order positions [start, stop) into out fp32.

        out is [t, stop − start]; queries fp32 [t, d].
        """
        torch.mm(queries, self.vectors[start:stop].float().t(), out=out)
        if self.bias is not None:
            out += self.bias[start:stop]

    def embed(self, position: np.ndarray, items: torch.Tensor) -> torch.Tensor:
        """Vectors fp32 [B, S, d] of item indices int64 [B, S].

        `position` gives each item's code-order position.
        """
        rows = torch.from_numpy(position[items.numpy()].astype(np.int64))
        return self.vectors.index_select(0, rows.view(-1)).view(*rows.shape, -1).float()

    def scores_at(self, queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [t, k] of code-order positions int64 [t, k], a row a query."""
        scores = torch.empty(positions.shape)
        step = max(1, GATHER_ELEMENTS // max(1, positions.shape[1] * self.vectors.shape[1]))
        for begin in range(0, len(positions), step):
            chunk = slice(begin, begin + step)
            gathered = self.vectors.index_select(0, positions[chunk].reshape(-1)).float()
            gathered = gathered.view(*positions[chunk].shape, -1)
            torch.bmm(gathered, queries[chunk, :, None], out=scores[chunk, :, None])
        return scores if self.bias is None else scores + self.bias[positions]


def in_memory_scorer(table: torch.Tensor, known: torch.Tensor, catalogue: Catalogue) -> ItemScorer:
    """The scorer of a model's table fp32 [num_items, d] and known bool [num_items].

    Both are in the order of item indices.
    """
    order = torch.from_numpy(catalogue.items.astype(np.int64))
    return ItemScorer(table.detach()[order].contiguous(), _known_bias(known[order]))


def _known_bias(known: torch.Tensor) -> torch.Tensor | None:
    return None if bool(known.all()) else torch.zeros(len(known)).masked_fill_(~known, -torch.inf)


def shard_nodes(trie: Trie, shards: int) -> list[tuple[int, int]]:
    """Divide the first-level nodes into ranges of about equally many items.

    Raises UserError when the nodes are too few.
    """
    starts = trie.node_start[1]
    cuts = np.unique(np.searchsorted(starts, np.linspace(0, starts[-1], shards + 1)))
    cuts[-1] = len(starts) - 1
    if len(np.unique(cuts)) != shards + 1:
        raise UserError(
            f"cf.reward_shards {shards}: the {len(starts) - 1} first codes do not fill so many "
            "shards; choose fewer"
        )
    return [(int(a), int(b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def write_scorer(
    folder: Path,
    table: torch.Tensor,
    known: torch.Tensor,
    trie: Trie,
    kind: str,
    shards: int = 1,
    prefix_items: int = PREFIX_ITEMS,
) -> None:
    """Write one fold's scorer of a large catalogue into a new folder.

    The files are vectors.npy and known.npy, both in code order, shards.npy,
    index-S.faiss per shard and moments-P.npz per depth. table fp32 [num_items, d] and
    known bool [num_items] are in the order of item indices; `kind` as of
    `build_ann_index`. Vectors are rounded to fp16, except for the flat index, which is
    there to be exact.
    """
    folder.mkdir()
    order = trie.catalogue.items
    known_here = known.numpy()[order]
    vectors = np.lib.format.open_memmap(
        folder / "vectors.npy",
        mode="w+",
        dtype=np.float32 if kind == "flat" else np.float16,
        shape=(len(order), table.shape[1]),
    )
    for start in range(0, len(order), COPY_ROWS):
        rows = torch.from_numpy(order[start : start + COPY_ROWS].astype(np.int64))
        vectors[start : start + COPY_ROWS] = table[rows].detach().numpy()
    vectors.flush()
    np.save(folder / "known.npy", known_here)
    ranges = shard_nodes(trie, shards)
    np.save(folder / "shards.npy", np.array(ranges))
    for shard, (first, stop) in enumerate(ranges):
        positions = _known_positions(known_here, trie, first, stop)
        index = build_ann_index(kind, vectors, positions)
        save_ann_index(index, folder / f"index-{shard}.faiss")
    tensor, mask = torch.from_numpy(np.asarray(vectors)), torch.from_numpy(known_here)
    for depth, nodes in enumerate(moment_nodes(trie, prefix_items), start=1):
        moments = cell_moments(tensor, mask, trie.node_start[depth], nodes)
        moments.save(folder / f"moments-{depth}.npz")


def moment_nodes(trie: Trie, prefix_items: int) -> list[np.ndarray]:
    """Per depth 1, 2, …: the nodes whose moments a reward may need, int64, ascending.

    All of depth 1; below, the children of prefixes of more than `prefix_items` items.
    """
    wanted = [np.arange(trie.num_nodes(1))]
    for depth in range(1, trie.depth):
        long = np.diff(trie.node_start[depth]) > prefix_items
        if not long.any():
            break
        wanted.append(np.flatnonzero(np.repeat(long, np.diff(trie.child_start[depth]))))
    return wanted


def read_scorer(folder: Path, trie: Trie, shard: int | None = None) -> ItemScorer:
    """Map what `write_scorer` wrote; of the indexes only that of `shard`, None: all.

    Raises UserError where a number is not finite. Hashes are checked by `load_fold`.
    """
    # Copy-on-write: torch wants writable memory.
    vectors = torch.from_numpy(np.lib.format.open_memmap(folder / "vectors.npy", mode="c"))
    require_finite(vectors, str(folder / "vectors.npy"))
    known = np.load(folder / "known.npy")
    ranges = [(int(a), int(b)) for a, b in np.load(folder / "shards.npy")]
    chosen = range(len(ranges)) if shard is None else [shard]
    moments: list[CellMoments] = []
    while (path := folder / f"moments-{len(moments) + 1}.npz").exists():
        moments.append(CellMoments.load(path))
    large = LargeCatalogue(
        [ranges[s] for s in chosen],
        [_known_positions(known, trie, *ranges[s]) for s in chosen],
        [load_ann_index(folder / f"index-{s}.faiss") for s in chosen],
        moments,
    )
    return ItemScorer(vectors, _known_bias(torch.from_numpy(known)), large)


def _known_positions(known: np.ndarray, trie: Trie, first: int, stop: int) -> np.ndarray:
    """Code-order positions int32 of the known items below nodes [first, stop)."""
    low, high = int(trie.node_start[1][first]), int(trie.node_start[1][stop])
    positions: np.ndarray = (np.flatnonzero(known[low:high]) + low).astype(np.int32)
    return positions


def load_fold(
    cf_folder: str | Path, name: str, trie: Trie, shard: int | None, code_order: dict[str, Any]
) -> tuple[SASRec, ItemScorer]:
    """A fold's model ("fold0", …) and its scorer: the one on disk, or made in memory.

    `code_order` is the manifest of the folder of that name. Every file that is read is
    compared with its SHA-256. Raises UserError where one is missing or damaged.
    """
    written = [file for file in code_order["files"] if file.startswith(f"{name}/")]
    if not written:
        model = load_cf(cf_folder, name)
        return model, in_memory_scorer(model.items.weight, model.known, trie.catalogue)
    folder = Path(cf_folder) / CODE_ORDER
    other_shards = [
        file
        for file in written
        if shard is not None and file.endswith(".faiss") and file != f"{name}/index-{shard}.faiss"
    ]
    checked_files(folder, sorted(set(written) - set(other_shards)), code_order)
    return load_cf(cf_folder, name, table=False), read_scorer(folder / name, trie, shard)
