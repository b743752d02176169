"""Rewards kept on disk per (user, position): a second epoch or run reads what the first one computed (`cf.reward_cache`; METHOD.md §5)."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ilrec_dist.cf.rewards.futures import Meter, RewardFuture
from ilrec_dist.cf.rewards.layout import num_rewards
from ilrec_dist.cf.sasrec.checkpoint import data_hash, read_code_order
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.trie import Trie

RECORD = np.dtype([("target", "<i8"), ("offset", "<i8"), ("count", "<i4"), ("crc", "<u4")])
ROWS = 40  # bits of a record's number within its file; the file's number stands above them


class Source(Protocol):
    meter: Meter

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture: ...


def cache_folder(cf_folder: str | Path, dataset: InteractionDataset) -> Path:
    """Where rewards of these models, indexes, codes and histories are kept: the name is a hash over the contents of all of them.

    In the folder that is made for the codes, so that it goes when they do.
    """
    contents = json.dumps([read_code_order(cf_folder), data_hash(dataset)], sort_keys=True)
    return (
        Path(cf_folder)
        / CODE_ORDER
        / "reward-cache"
        / hashlib.sha256(contents.encode()).hexdigest()[:32]
    )


class CachedRewards:
    """A source of rewards with the disk before it. A request is answered from disk when all its targets are there, with the bits that were stored;
    else the source computes all of it, so that a repeated request has the same bits whether or not a part of it had been asked for before.

    Every process appends to two files of its own – values, then a record a target with its CRC-32 – and reads those of all. What a killed writer left
    half-written has no record, or one whose sum is wrong; it is computed again, and so is one with another number of rewards than the codes ask for.
    """

    def __init__(
        self, source: Source, folder: str | Path, dataset: InteractionDataset, trie: Trie
    ) -> None:
        self.source, self.meter, self.dataset, self.trie, self.folder = (
            source,
            source.meter,
            dataset,
            trie,
            Path(folder),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._place = np.full(
            dataset.num_interactions, -1, np.int64
        )  # of each target (its place in prepared.items): file and record
        self._names: list[str] = []
        self._records: list[np.ndarray] = []
        self._own = self.folder / uuid.uuid4().hex
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-cache")

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """As `TokenRewards.fetch_async`."""
        targets = self.dataset.offsets[users] + positions
        if (self._place[targets] < 0).any():
            self._refresh()
        found = self._read(targets) if (self._place[targets] >= 0).all() else None
        if found is not None:
            answer = RewardFuture(self.meter, self._thread, lambda: found)
            answer.keep = self._count  # when it is taken, as all answers are counted
            return answer
        pending = self.source.fetch_async(users, positions)
        pending.keep = partial(self._store, targets)
        return pending

    def _count(self, _: np.ndarray) -> None:
        self.meter.cached += 1

    def _refresh(self) -> None:
        """Learn what all writers have added."""
        for path in sorted(self.folder.glob("*.records")):
            if path.stem not in self._names:
                self._names.append(path.stem)
                self._records.append(np.zeros(0, RECORD))
            number = self._names.index(path.stem)
            known = len(self._records[number])
            new = np.fromfile(path, RECORD, offset=known * RECORD.itemsize)  # whole records only
            if len(new):
                self._records[number] = np.concatenate([self._records[number], new])
                self._place[new["target"]] = (number << ROWS) + known + np.arange(len(new))

    def _read(self, targets: np.ndarray) -> np.ndarray | None:
        """The stored rewards of targets that all have a record, float32; None, and the records forgotten, where one does not hold."""
        place = self._place[targets]
        files, rows = place >> ROWS, place & ((1 << ROWS) - 1)
        records = np.empty(len(targets), RECORD)
        for number in np.unique(files):
            records[files == number] = self._records[number][rows[files == number]]
        right = records["count"] == num_rewards(self.trie, self.dataset.items[targets])
        if not right.all():
            self._place[targets[~right]] = -1
            return None
        ends = np.cumsum(records["count"], dtype=np.int64)
        rewards = np.empty(int(ends[-1]) if len(ends) else 0, np.float32)
        whole = True
        for number in np.unique(files):
            with open(self.folder / f"{self._names[number]}.values", "rb", buffering=0) as file:
                for which in np.flatnonzero(files == number):
                    _, offset, count, crc = records[which].tolist()
                    value = os.pread(file.fileno(), 4 * count, offset)
                    if len(value) == 4 * count and zlib.crc32(value) == crc:
                        rewards[ends[which] - count : ends[which]] = np.frombuffer(value, "<f4")
                    else:
                        self._place[targets[which]] = -1
                        whole = False
        return rewards if whole else None

    def _store(self, targets: np.ndarray, rewards: np.ndarray) -> None:
        """Append the rewards of a request to this process's files: the values first."""
        counts = num_rewards(self.trie, self.dataset.items[targets])
        values = memoryview(rewards.astype("<f4").tobytes())
        records = np.zeros(len(targets), RECORD)
        records["target"], records["count"] = targets, counts
        ends = 4 * np.cumsum(counts)
        records["crc"] = [
            zlib.crc32(values[begin:end])
            for begin, end in zip(ends - 4 * counts, ends, strict=True)
        ]
        with open(self._own.with_suffix(".values"), "ab") as file:
            records["offset"] = file.tell() + ends - 4 * counts
            file.write(values)
        with open(self._own.with_suffix(".records"), "ab") as file:
            file.write(records.tobytes())
