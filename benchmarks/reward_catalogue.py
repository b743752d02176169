"""Draws the catalogues that `rewards.py` and `scaling.py` measure, and serves their
token rewards.

    python benchmarks/reward_catalogue.py FOLDER ITEMS USERS

Item vectors are sums of code vectors, as residual quantisation
would recover them, and noise; histories stay near a code.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from harness import NumberedIds, in_own_process

from ilrec_dist.cf.rewards.index import SCAN_ITEMS
from ilrec_dist.cf.rewards.item_scorer import PREFIX_ITEMS, read_scorer, write_scorer
from ilrec_dist.cf.rewards.token_rewards import TokenRewards, merge_shards
from ilrec_dist.cf.sasrec.model import SASRec
from ilrec_dist.cf.sasrec.sharded_table import ItemShard
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.trie import Trie

WIDTH, LEVELS, CODES, BATCH = 64, 4, 256, 512
# The norm of an item's vector. Queries have norm 8, so this decides how peaked P_CF is: about half
# its mass is outside the top 512 of 10⁶ items.
NORM = 2.0

# The users and the positions of a batch's targets, int64 [T] each.
Targets = tuple[np.ndarray, np.ndarray]


def first_code_shares() -> np.ndarray:
    """How the items are spread over the first codes, float64 [CODES]."""
    popularity = 1 / np.arange(1, CODES + 1) ** 0.5
    return np.asarray(popularity / popularity.sum())


def draw(
    folder: Path,
    items: int,
    users: int,
    scan_items: int = SCAN_ITEMS,
    prefix_items: int = PREFIX_ITEMS,
) -> None:
    """Write a catalogue, a CF model's vectors and one history a user.

    The vectors have their store when they are of more than `scan_items` items.
    """
    rng = np.random.default_rng(0)
    codes = np.stack(
        [rng.choice(CODES, items, p=first_code_shares())]
        + [rng.integers(0, CODES, items) for _ in range(LEVELS - 1)],
        axis=1,
    )
    catalogue = make_catalogue(codes, [CODES] * LEVELS)
    folder.mkdir(parents=True)
    catalogue.save(folder)
    trie = Trie(catalogue)
    trie.save(folder)
    table = _item_vectors(rng, codes)
    _save_histories(rng, folder, catalogue, users)
    known = torch.from_numpy(rng.random(items) < 0.98)
    if items > scan_items:
        write_scorer(folder / "fold0", table, known, trie, "ivf_pq", prefix_items=prefix_items)
    else:
        torch.save({"table": table, "known": known}, folder / "table.pt")


def _item_vectors(rng: np.random.Generator, codes: np.ndarray) -> torch.Tensor:
    """Vectors of items with these codes, float32 [n, WIDTH]."""
    table = torch.from_numpy(rng.standard_normal((len(codes), WIDTH), dtype=np.float32)).mul_(
        0.6 * NORM / WIDTH**0.5
    )
    for level, size in enumerate((0.6, 0.45, 0.3)):
        centroids = (
            torch.from_numpy(rng.normal(size=(CODES, WIDTH)).astype(np.float32))
            * size
            * NORM
            / WIDTH**0.5
        )
        table += centroids[torch.from_numpy(codes[:, level].astype(np.int64))]
    return table


def _save_histories(
    rng: np.random.Generator, folder: Path, catalogue: Catalogue, users: int
) -> None:
    """Write histories.npy and offsets.npy: 3 to 19 items a user, 70 % of them near one
    item.
    """
    items = catalogue.num_items
    lengths = rng.integers(3, 20, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    anchor = np.repeat(rng.integers(0, items, users), lengths)
    near = np.clip(
        catalogue.position[anchor]
        + rng.normal(scale=items / CODES / 4, size=len(anchor)).astype(np.int64),
        0,
        items - 1,
    )
    wander = rng.random(len(anchor)) < 0.3
    histories = np.where(wander, rng.integers(0, items, len(anchor)), catalogue.items[near])
    np.save(folder / "histories.npy", histories.astype(np.int32))
    np.save(folder / "offsets.npy", offsets)


def draw_in_own_process(
    folder: Path,
    items: int,
    users: int,
    scan_items: int = SCAN_ITEMS,
    prefix_items: int = PREFIX_ITEMS,
) -> float:
    """As `draw`, whose memory is not the caller's then; returns its seconds."""
    numbers = (items, users, scan_items, prefix_items)
    seconds: float = in_own_process(__file__, str(folder), *map(str, numbers))["seconds"]
    return seconds


class UnstoredRewards(TokenRewards):
    """Every target's rewards are computed when they are asked for.

    An actor does not begin to compute those of
    all training targets beside the measurement.
    """

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return merge_shards([self.shard_rewards(users, positions)])

    def precompute_in_background(self, threads: int) -> None:
        return


def load(folder: Path) -> TokenRewards:
    """The rewards of what `draw` wrote. An actor finds this function by its module's
    name.
    """
    catalogue = Catalogue.load(folder)
    trie, items = Trie.load(folder, catalogue), catalogue.num_items
    offsets = np.load(folder / "offsets.npy")
    users = len(offsets) - 1
    dataset = InteractionDataset(
        np.load(folder / "histories.npy"), offsets, NumberedIds(users), NumberedIds(items)
    )
    torch.manual_seed(0)
    small = folder / "table.pt"
    model = SASRec(ItemShard(items if small.exists() else 1), WIDTH, 2, 2, 0.0, 50).eval()
    scorers = None
    if small.exists():
        state = torch.load(small)
        model.items.weight.data = state["table"]
        model.known.copy_(state["known"])
    else:
        scorers = [read_scorer(folder / "fold0", trie)]
    return UnstoredRewards([model], np.zeros(users, np.int64), dataset, catalogue, trie, scorers)


def batches(rewards: TokenRewards) -> list[Targets]:
    """The last item of every user as a target, BATCH of them at a time."""
    users = np.arange(rewards.dataset.num_users)
    positions = rewards.dataset.lengths() - 1
    return [(users[i : i + BATCH], positions[i : i + BATCH]) for i in range(0, len(users), BATCH)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="written here; must not exist")
    parser.add_argument("items", type=int)
    parser.add_argument("users", type=int)
    parser.add_argument("scan_items", type=int, nargs="?", default=SCAN_ITEMS)
    parser.add_argument("prefix_items", type=int, nargs="?", default=PREFIX_ITEMS)
    started = time.perf_counter()
    draw(**vars(parser.parse_args()))
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
