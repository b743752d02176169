"""Token rewards r(v): how much of a prefix's collaborative probability each next token leads to, for many targets at once (METHOD.md §5)."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ilrec_dist.cf.rewards.futures import Meter, RewardFuture
from ilrec_dist.cf.rewards.item_scorer import FoldScorer, in_memory, load_scorer
from ilrec_dist.cf.rewards.layout import Plan
from ilrec_dist.cf.rewards.precomputed import RewardMemory, fits
from ilrec_dist.cf.rewards.prefix_mass import (
    Hits,
    RewardOptions,
    deeper_shares,
    first_log_masses,
    scan_catalogue,
)
from ilrec_dist.cf.rewards.segment_softmax import softmax_rows
from ilrec_dist.cf.sasrec.checkpoint import (
    data_hash,
    load_folds,
    read_code_order,
    read_manifest,
)
from ilrec_dist.cf.sasrec.model import SASRec, encode
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, catalogue_hash
from ilrec_dist.items.trie import Trie


@dataclass(frozen=True)
class Part:
    """What one shard knows of T targets' rewards: the log mass of each first code it holds, and the rows below of the targets that are its own."""

    first: np.ndarray  # float32 [T, first codes of the shard]
    own: np.ndarray  # int64 [o] targets whose item is in the shard's range
    lengths: np.ndarray  # int64 [o] rewards of their rows of depth ≥ 1
    deeper: np.ndarray  # float32 [Σ lengths]


def merge(parts: Sequence[Part]) -> np.ndarray:
    """The rewards float32 [nnz] of targets from all shards' parts, in shard order."""
    first = softmax_rows(np.concatenate([part.first for part in parts], axis=1))
    targets, codes = first.shape
    lengths = np.zeros(targets, np.int64)
    for part in parts:
        lengths[part.own] = part.lengths
    starts = np.cumsum(lengths + codes) - lengths - codes
    rewards = np.empty(int((lengths + codes).sum()), np.float32)
    rewards[(starts[:, None] + np.arange(codes)).ravel()] = first.ravel()
    for part in parts:
        rewards[ragged_ranges(starts[part.own] + codes, part.lengths)] = part.deeper
    return rewards


class TokenRewards:
    """In-process rewards. Each user is scored by the model of their fold, which saw none of that user's sequence."""

    def __init__(
        self,
        models: list[SASRec],
        folds: np.ndarray,
        dataset: InteractionDataset,
        catalogue: Catalogue,
        trie: Trie,
        scorers: list[FoldScorer] | None = None,
        options: RewardOptions | None = None,
    ) -> None:
        self.models, self.folds, self.dataset, self.catalogue, self.trie = (
            models,
            folds,
            dataset,
            catalogue,
            trie,
        )
        self.scorers = scorers or [
            in_memory(model.items.weight, model.known, catalogue) for model in models
        ]
        self.options = options or RewardOptions()
        self.counters = {"calls": 0, "targets": 0, "rows": 0, "covered_rows": 0, "seconds": 0.0}
        self.meter = Meter()

    @staticmethod
    def open(
        cf_folder: str | Path,
        dataset: InteractionDataset,
        catalogue: Catalogue,
        trie: Trie,
        shard: int | None = None,
        options: RewardOptions | None = None,
    ) -> TokenRewards:
        """Load what `train_cf` and `write_code_order` wrote; of a sharded catalogue the indexes of one shard, or of all (None).

        Raises UserError when a file's hash, the data or the catalogue is not what the folder was made for, or when it has no such shard.
        """
        manifest, code_order = read_manifest(cf_folder), read_code_order(cf_folder)
        folds = load_folds(cf_folder)
        for what, found, expected in (
            ("users", dataset.num_users, len(folds)),
            ("items", dataset.num_items, manifest["items"]),
        ):
            if found != expected:
                raise UserError(
                    f"{cf_folder}: its models were trained for {expected} {what}, the prepared data has {found}; run `ilrec cf` again"
                )
        if manifest["data"] != (given := data_hash(dataset)):
            raise UserError(
                f"{cf_folder}: its models were trained on other data of the same size (SHA-256 {manifest['data'][:16]}…, the prepared data has "
                f"{given[:16]}…); run `ilrec cf` again"
            )
        if code_order["catalogue"] != catalogue_hash(catalogue):
            raise UserError(
                f"{cf_folder}: made for another catalogue (the hash in {CODE_ORDER}/manifest.json differs); run `ilrec cf` and `ilrec index` again"
            )
        if shard is not None and (code_order["index"] == "scan" or shard >= code_order["shards"]):
            what = (
                "no index was written, the catalogue is scanned whole"
                if code_order["index"] == "scan"
                else f"written for {code_order['shards']}"
            )
            raise UserError(
                f"{cf_folder}: no shard {shard}: {what}; set cf.reward_shards and cf.reward_index, and run `ilrec cf` again"
            )
        loaded = [
            load_scorer(cf_folder, f"fold{fold}", trie, shard, code_order)
            for fold in range(manifest["config"]["cf_folds"])
        ]
        return TokenRewards(
            [model for model, _ in loaded],
            folds,
            dataset,
            catalogue,
            trie,
            [scorer for _, scorer in loaded],
            options,
        )

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rewards of T targets: float32 [nnz], one-to-one with the tokens of `trie.target_candidates(target items)`.

        Target (user, position), int [T] each, is item `dataset.sequence(user)[position]`, position ≥ 1; only what stands before it is read,
        so nothing at or after the target changes a bit. r(v) = Σ P_CF over items below (prefix, v) ÷ Σ below the prefix; 0 for items that the
        model does not know. Raises ValueError for a position that is no target.
        """
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        if (
            self._memory is None
            or not self._memory.holds(users, positions)
            or (positions < 1).any()
        ):
            return merge([self.part(users, positions)])
        started = time.perf_counter()
        rewards, covered = self._memory.fetch(users, positions)
        self._count(covered, time.perf_counter() - started)
        return rewards

    def part(self, users: np.ndarray, positions: np.ndarray) -> Part:
        """This shard's part of `fetch`."""
        started = time.perf_counter()
        found, covered = self._compute(np.asarray(users, np.int64), np.asarray(positions, np.int64))
        self._count(covered, time.perf_counter() - started)
        return found

    def _compute(self, users: np.ndarray, positions: np.ndarray) -> tuple[Part, np.ndarray]:
        """The part, and how many rows of each own target have a reward above 0, int64 [o]."""
        starts = self.dataset.offsets[users]
        if ((positions < 1) | (positions >= self.dataset.offsets[users + 1] - starts)).any():
            raise ValueError("a reward needs a position in [1, length of the user's sequence)")
        plan = Plan(self.trie, self.dataset.items[starts + positions])
        low, high = self.first_codes
        own = np.flatnonzero((plan.first_node >= low) & (plan.first_node < high))
        first = np.empty((len(users), high - low), np.float32)
        deeper = np.zeros(plan.indptr[-1], np.float32)
        for fold in np.unique(self.folds[users]):
            scorer = self.scorers[fold]
            chosen = np.flatnonzero(self.folds[users] == fold)
            embed = None if scorer.large is None else partial(scorer.embed, self._position)
            queries = encode(
                self.models[fold], self.dataset.items, starts[chosen], positions[chosen], embed
            )
            if scorer.large is None:
                scan_catalogue(scorer, queries, chosen, plan, first, deeper)
                continue
            hits = first_log_masses(scorer, queries, chosen, plan, first, self.options)
            mine = np.flatnonzero(
                (plan.first_node[chosen] >= low) & (plan.first_node[chosen] < high)
            )
            hits = [Hits(found.where[mine], found.score[mine], found.cap[mine]) for found in hits]
            deeper_shares(scorer, queries[mine], chosen[mine], plan, hits, deeper, self.options)
        below = (
            plan.indptr[:: max(1, self.trie.depth - 1)]
            if self.trie.depth > 1
            else np.zeros(len(users) + 1, np.int64)
        )
        lengths = np.diff(below)[own]
        found = Part(first, own, lengths, deeper[ragged_ranges(below[own], lengths)])
        rows = found.own[:, None] * (self.trie.depth - 1) + np.arange(self.trie.depth - 1)
        counts = np.diff(plan.indptr)[rows.ravel()]
        covered = np.any(np.isfinite(first[own]), axis=1).astype(np.int64)
        if len(counts):
            mass = np.add.reduceat(found.deeper, np.cumsum(counts) - counts).reshape(len(own), -1)
            covered += np.count_nonzero(mass, axis=1)
        return found, covered

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """Begin `fetch` on a thread of its own, one request at a time, and return at once; `.result()` gives the rewards."""
        return RewardFuture(self.meter, self._thread, lambda: self.fetch(users, positions))

    @cached_property
    def first_codes(self) -> tuple[int, int]:
        """First-level nodes [start, stop) that this process holds."""
        large = self.scorers[0].large
        return (large.shards[0][0], large.shards[-1][1]) if large else (0, self.trie.num_nodes(1))

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="token-rewards")

    @cached_property
    def _position(self) -> np.ndarray:
        return self.catalogue.position

    def learn_ahead(self, threads: int) -> None:
        """Where rewards are kept in memory, begin to compute all of them, in a thread beside `fetch`: the workers take a while to start."""
        memory = self._memory
        if memory is None:
            return

        def learn() -> None:
            torch.set_num_threads(threads)  # counts for one thread alone
            memory.learn()

        threading.Thread(target=learn, daemon=True, name="reward-memory").start()

    @cached_property
    def _memory(self) -> RewardMemory | None:
        """Of a catalogue that is scanned whole and few enough interactions."""
        if self.scorers[0].large is not None or not fits(self.dataset, self.trie):
            return None

        def compute(users: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found, covered = self._compute(users, positions)
            return merge([found]), covered

        return RewardMemory(self.dataset, self.trie, compute)

    def _count(self, covered: np.ndarray, seconds: float) -> None:
        """Add one call. Rows are targets × code levels; covered ones have a reward above 0. Targets count where their own item is held."""
        targets = len(covered)
        for key, value in (
            ("calls", 1), ("targets", targets), ("rows", targets * self.trie.depth), ("covered_rows", int(covered.sum())), ("seconds", seconds)
        ):  # fmt: skip
            self.counters[key] += value
