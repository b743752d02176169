"""Token rewards r(v), for many targets at once (METHOD.md §5).

r(v) is the share of a prefix's collaborative probability that lies below its child v.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilrec_dist.cf.rewards.futures import LatencyMeter, RewardFuture
from ilrec_dist.cf.rewards.item_scorer import ItemScorer, in_memory_scorer, load_fold
from ilrec_dist.cf.rewards.layout import RewardLayout
from ilrec_dist.cf.rewards.precomputed import PrecomputedRewards, fits_in_memory
from ilrec_dist.cf.rewards.prefix_mass import (
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
class ShardRewards:
    """What one shard of the catalogue knows of T targets' rewards.

    The log mass of each first code it holds, for all targets, and the deeper rewards of
    the targets whose item it holds.
    """

    # float32 [T, first codes of the shard].
    first_log_mass: np.ndarray
    # int64 [o]: the targets whose item is in the shard's range.
    targets: np.ndarray
    # int64 [o]: how many rewards their rows of depth ≥ 1 have.
    lengths: np.ndarray
    # float32 [Σ lengths].
    deeper: np.ndarray


def merge_shards(shards: Sequence[ShardRewards]) -> np.ndarray:
    """The rewards float32 [nnz] of targets from what all shards know, in
    shard order.
    """
    first = softmax_rows(np.concatenate([shard.first_log_mass for shard in shards], axis=1))
    num_targets, codes = first.shape
    lengths = np.zeros(num_targets, np.int64)
    for shard in shards:
        lengths[shard.targets] = shard.lengths
    starts = np.cumsum(lengths + codes) - lengths - codes
    rewards = np.empty(int((lengths + codes).sum()), np.float32)
    rewards[(starts[:, None] + np.arange(codes)).ravel()] = first.ravel()
    for shard in shards:
        rewards[ragged_ranges(starts[shard.targets] + codes, shard.lengths)] = shard.deeper
    return rewards


class TokenRewards:
    """Rewards computed in this process.

    Each user is scored by the model of their fold, which saw none of that user's
    sequence.
    """

    def __init__(
        self,
        models: list[SASRec],
        folds: np.ndarray,
        dataset: InteractionDataset,
        catalogue: Catalogue,
        trie: Trie,
        scorers: list[ItemScorer] | None = None,
        options: RewardOptions | None = None,
    ) -> None:
        """models and scorers: one of each fold; folds int64 [U]: the fold
        of each user.
        """
        self.models, self.folds, self.dataset = models, folds, dataset
        self.catalogue, self.trie = catalogue, trie
        self.scorers = scorers or [
            in_memory_scorer(model.items.weight, model.known, catalogue) for model in models
        ]
        self.options = options or RewardOptions()
        self.counters = {"calls": 0, "targets": 0, "rows": 0, "covered_rows": 0, "seconds": 0.0}
        self.meter = LatencyMeter()

    @staticmethod
    def open(
        cf_folder: str | Path,
        dataset: InteractionDataset,
        catalogue: Catalogue,
        trie: Trie,
        shard: int | None = None,
        options: RewardOptions | None = None,
    ) -> TokenRewards:
        """Load what `train_cf` and `write_code_order` wrote.

        Of a sharded catalogue the indexes of one shard, or of all (None). Raises
        UserError when a file is damaged, the data or the catalogue is not what the
        folder was made for, or it has no such shard.
        """
        manifest, code_order = read_manifest(cf_folder), read_code_order(cf_folder)
        folds = load_folds(cf_folder)
        _require_same_data(cf_folder, manifest, dataset, len(folds))
        if code_order["catalogue"] != catalogue_hash(catalogue):
            raise UserError(
                f"{cf_folder}: made for another catalogue (the hash in {CODE_ORDER}/manifest.json "
                "differs); run `ilrec cf` and `ilrec index` again"
            )
        if shard is not None:
            _require_shard(cf_folder, code_order, shard)
        loaded = [
            load_fold(cf_folder, f"fold{fold}", trie, shard, code_order)
            for fold in range(manifest["config"]["cf_folds"])
        ]
        models, scorers = [model for model, _ in loaded], [scorer for _, scorer in loaded]
        return TokenRewards(models, folds, dataset, catalogue, trie, scorers, options)

    def fetch(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rewards of T targets, float32 [nnz].

        They are aligned with `trie.target_candidates` of the targets' items. Target
        (user, position), int [T] each, is item `dataset.sequence(user)[position]`,
        position ≥ 1; only what stands before it is read, so nothing at or after the
        target changes a bit. r(v) = Σ P_CF over items below (prefix, v) ÷ Σ below the
        prefix; 0 for items that the model does not know. Raises ValueError for a
        position that is no target, and UserError where a reward is not finite.
        """
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        precomputed = self._precomputed
        if precomputed is None or not precomputed.holds(users, positions) or (positions < 1).any():
            return merge_shards([self.shard_rewards(users, positions)])
        started = time.perf_counter()
        rewards, covered = precomputed.fetch(users, positions)
        self._count(covered, time.perf_counter() - started)
        return rewards

    def shard_rewards(self, users: np.ndarray, positions: np.ndarray) -> ShardRewards:
        """What this shard knows of the rewards that `fetch` gives."""
        started = time.perf_counter()
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        rewards, covered = self._compute(users, positions)
        self._count(covered, time.perf_counter() - started)
        return rewards

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """Begin `fetch` on a thread, one request at a time."""
        return RewardFuture(self.meter, self._thread, lambda: self.fetch(users, positions))

    def precompute_in_background(self, threads: int) -> None:
        """Begin to compute all rewards that are kept, in a thread beside `fetch`.

        The workers take a while to start.
        """
        precomputed = self._precomputed
        if precomputed is None:
            return

        def compute_all() -> None:
            # The number of threads counts for one Python thread alone.
            torch.set_num_threads(threads)
            precomputed.compute_blocks()

        threading.Thread(target=compute_all, daemon=True, name="precompute-rewards").start()

    @cached_property
    def first_codes(self) -> tuple[int, int]:
        """First-level nodes [start, stop) that this process holds."""
        large = self.scorers[0].large
        return (large.shards[0][0], large.shards[-1][1]) if large else (0, self.trie.num_nodes(1))

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="token-rewards")

    @cached_property
    def _code_position(self) -> np.ndarray:
        return self.catalogue.position

    @cached_property
    def _precomputed(self) -> PrecomputedRewards | None:
        """For a catalogue that is scanned whole and few enough interactions."""
        if self.scorers[0].large is not None or not fits_in_memory(self.dataset, self.trie):
            return None

        def compute(users: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rewards, covered = self._compute(users, positions)
            return merge_shards([rewards]), covered

        return PrecomputedRewards(self.dataset, self.trie, compute)

    def _compute(self, users: np.ndarray, positions: np.ndarray) -> tuple[ShardRewards, np.ndarray]:
        """The shard's rewards, and the covered rows int64 [o] of targets it holds.

        A covered row has a reward above 0.
        """
        starts = self.dataset.offsets[users]
        if ((positions < 1) | (positions >= self.dataset.offsets[users + 1] - starts)).any():
            raise ValueError("a reward needs a position in [1, length of the user's sequence)")
        layout = RewardLayout(self.trie, self.dataset.items[starts + positions])
        low, high = self.first_codes
        in_shard = (layout.first_node >= low) & (layout.first_node < high)
        first = np.empty((len(users), high - low), np.float32)
        deeper = np.zeros(layout.indptr[-1], np.float32)
        for fold in np.unique(self.folds[users]):
            targets = np.flatnonzero(self.folds[users] == fold)
            scorer = self.scorers[fold]
            embed = None if scorer.large is None else partial(scorer.embed, self._code_position)
            queries = encode(
                self.models[fold], self.dataset.items, starts[targets], positions[targets], embed
            )
            if not bool(torch.isfinite(queries).all()):
                raise _diverged(f"CF model 'fold{fold}'")
            self._compute_fold(scorer, queries, targets, in_shard, layout, first, deeper)
        # A log mass of −inf is that of codes whose items the model does not know.
        if np.isnan(first).any() or np.isposinf(first).any() or not np.isfinite(deeper).all():
            raise _diverged("a CF model")
        rewards = self._shard_rewards(layout, np.flatnonzero(in_shard), first, deeper)
        return rewards, self._covered_rows(layout, rewards)

    def _compute_fold(
        self,
        scorer: ItemScorer,
        queries: torch.Tensor,
        targets: np.ndarray,
        in_shard: np.ndarray,
        layout: RewardLayout,
        first: np.ndarray,
        deeper: np.ndarray,
    ) -> None:
        """Write the log masses and shares of one fold's targets into first
        and deeper.
        """
        if scorer.large is None:
            scan_catalogue(scorer, queries, targets, layout, first, deeper)
            return
        scored = first_log_masses(scorer, queries, targets, layout, first, self.options)
        here = np.flatnonzero(in_shard[targets])
        scored = [items.select(here) for items in scored]
        deeper_shares(scorer, queries[here], targets[here], layout, scored, deeper, self.options)

    def _shard_rewards(
        self, layout: RewardLayout, targets: np.ndarray, first: np.ndarray, deeper: np.ndarray
    ) -> ShardRewards:
        if self.trie.depth > 1:
            bounds = layout.indptr[:: self.trie.depth - 1]
        else:
            bounds = np.zeros(len(first) + 1, np.int64)
        lengths = np.diff(bounds)[targets]
        inner = deeper[ragged_ranges(bounds[targets], lengths)]
        return ShardRewards(first, targets, lengths, inner)

    def _covered_rows(self, layout: RewardLayout, rewards: ShardRewards) -> np.ndarray:
        targets, deeper_depths = rewards.targets, self.trie.depth - 1
        rows = targets[:, None] * deeper_depths + np.arange(deeper_depths)
        counts = np.diff(layout.indptr)[rows.ravel()]
        covered: np.ndarray = np.any(np.isfinite(rewards.first_log_mass[targets]), axis=1).astype(
            np.int64
        )
        if len(counts):
            mass = np.add.reduceat(rewards.deeper, np.cumsum(counts) - counts)
            covered += np.count_nonzero(mass.reshape(len(targets), -1), axis=1)
        return covered

    def _count(self, covered: np.ndarray, seconds: float) -> None:
        """Add one call to the counters.

        Rows are targets × code levels. Targets count where their item is held.
        """
        added = {
            "calls": 1,
            "targets": len(covered),
            "rows": len(covered) * self.trie.depth,
            "covered_rows": int(covered.sum()),
            "seconds": seconds,
        }
        for key, value in added.items():
            self.counters[key] += value


def _diverged(model: str) -> UserError:
    return UserError(
        f"the token rewards are not finite, so {model} has diverged; lower cf.learning_rate and "
        "run `ilrec cf` again"
    )


def _require_same_data(
    cf_folder: str | Path, manifest: dict[str, Any], dataset: InteractionDataset, users: int
) -> None:
    for what, here, expected in (
        ("users", dataset.num_users, users),
        ("items", dataset.num_items, manifest["items"]),
    ):
        if here != expected:
            raise UserError(
                f"{cf_folder}: its models were trained for {expected} {what}, the prepared data "
                f"has {here}; run `ilrec cf` again"
            )
    if manifest["data"] != (here_hash := data_hash(dataset)):
        raise UserError(
            f"{cf_folder}: its models were trained on other data of the same size (SHA-256 "
            f"{manifest['data'][:16]}…, the prepared data has {here_hash[:16]}…); run `ilrec cf` "
            "again"
        )


def _require_shard(cf_folder: str | Path, code_order: dict[str, Any], shard: int) -> None:
    if code_order["index"] == "scan":
        what = "no index was written, the catalogue is scanned whole"
    elif shard >= code_order["shards"]:
        what = f"written for {code_order['shards']}"
    else:
        return
    raise UserError(
        f"{cf_folder}: no shard {shard}: {what}; set cf.reward_shards and cf.reward_index, and "
        "run `ilrec cf` again"
    )
