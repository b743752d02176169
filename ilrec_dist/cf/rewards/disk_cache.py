"""Rewards kept on disk per (user, position), `cf.reward_cache` (METHOD.md §5).

A second epoch or run reads what the first one computed.
"""

from __future__ import annotations

import os
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ilrec_dist.cf.rewards.futures import RewardFuture, RewardSource
from ilrec_dist.cf.rewards.layout import num_rewards
from ilrec_dist.cf.sasrec.checkpoint import data_hash, read_code_order
from ilrec_dist.common.files import sha256_json
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.trie import Trie

RECORD = np.dtype([("target", "<i8"), ("offset", "<i8"), ("count", "<i4"), ("crc", "<u4")])
# Bits of a record's number within its file; the file's number stands above them.
ROW_BITS = 40


def cache_folder(cf_folder: str | Path, dataset: InteractionDataset) -> Path:
    """The folder for rewards of these models, indexes, codes and histories.

    Its name is a hash over the contents of all of them. It lies in the folder that is
    made for the codes, so that it goes when they do.
    """
    name = sha256_json([read_code_order(cf_folder), data_hash(dataset)])[:32]
    return Path(cf_folder) / CODE_ORDER / "reward-cache" / name


class CachedRewards:
    """A source of rewards with the disk before it.

    A request is answered from disk when all its targets are there, with the bits that
    were stored; else the source computes all of it, so that a repeated request has the
    same bits whether or not some of its targets had been asked for before.

    Every process appends to two files of its own (values, then a record a target with
    the CRC-32 of target and values) and reads those of all processes. What a killed
    writer left half-written has no record, or one whose checksum is wrong; it is
    computed again, and so is one with another number of rewards than the codes ask for,
    and all of a file that is gone.
    """

    def __init__(
        self, source: RewardSource, folder: str | Path, dataset: InteractionDataset, trie: Trie
    ) -> None:
        self.source, self.meter, self.folder = source, source.meter, Path(folder)
        self.dataset, self.trie = dataset, trie
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of each target, by its index in dataset.items: the numbers of file and record, or −1.
        self._record_of = np.full(dataset.num_interactions, -1, np.int64)
        self._names: list[str] = []
        self._records: list[np.ndarray] = []
        self._writer_files = self.folder / uuid.uuid4().hex
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-cache")

    def fetch_async(self, users: np.ndarray, positions: np.ndarray) -> RewardFuture:
        """As `TokenRewards.fetch_async`."""
        targets = self.dataset.offsets[users] + positions
        if (self._record_of[targets] < 0).any():
            self._read_new_records()
        rewards = self._read(targets) if (self._record_of[targets] >= 0).all() else None
        if rewards is not None:
            future = RewardFuture(self.meter, self._thread, lambda: rewards)
            # Counted when it is taken, as all answers are.
            future.on_taken = self._count_cached
            return future
        future = self.source.fetch_async(users, positions)
        future.on_taken = partial(self._store, targets)
        return future

    def _count_cached(self, _: np.ndarray) -> None:
        self.meter.cached += 1

    def _read_new_records(self) -> None:
        """Learn what all writers have added."""
        for path in sorted(self.folder.glob("*.records")):
            if path.stem not in self._names:
                self._names.append(path.stem)
                self._records.append(np.zeros(0, RECORD))
            number = self._names.index(path.stem)
            count = len(self._records[number])
            # A half-written record at the end is not read.
            new = np.fromfile(path, RECORD, offset=count * RECORD.itemsize)
            if len(new):
                self._records[number] = np.concatenate([self._records[number], new])
                # A damaged record may name a target that there is not.
                known = (new["target"] >= 0) & (new["target"] < len(self._record_of))
                rows = count + np.flatnonzero(known)
                self._record_of[new["target"][known]] = (number << ROW_BITS) + rows

    def _read(self, targets: np.ndarray) -> np.ndarray | None:
        """The stored rewards of targets that all have a record, float32.

        None, and the record forgotten, where one does not hold.
        """
        number = self._record_of[targets]
        files, rows = number >> ROW_BITS, number & ((1 << ROW_BITS) - 1)
        records = np.empty(len(targets), RECORD)
        for file_number in np.unique(files):
            here = files == file_number
            records[here] = self._records[file_number][rows[here]]
        fits = records["count"] == num_rewards(self.trie, self.dataset.items[targets])
        if not fits.all():
            self._record_of[targets[~fits]] = -1
            return None
        ends = np.cumsum(records["count"], dtype=np.int64)
        rewards = np.empty(int(ends[-1]) if len(ends) else 0, np.float32)
        all_whole = True
        for file_number in np.unique(files):
            here = np.flatnonzero(files == file_number)
            path = self.folder / f"{self._names[file_number]}.values"
            try:
                file = open(path, "rb", buffering=0)
            except FileNotFoundError:
                self._record_of[targets[here]] = -1
                all_whole = False
                continue
            with file:
                for index in here:
                    _, offset, count, crc = records[index].tolist()
                    value = _pread(file.fileno(), 4 * count, offset)
                    if len(value) == 4 * count and _checksum(targets[index], value) == crc:
                        rewards[ends[index] - count : ends[index]] = np.frombuffer(value, "<f4")
                    else:
                        self._record_of[targets[index]] = -1
                        all_whole = False
        return rewards if all_whole else None

    def _store(self, targets: np.ndarray, rewards: np.ndarray) -> None:
        """Append the rewards of a request to this process's files: the values first."""
        counts = num_rewards(self.trie, self.dataset.items[targets])
        values = memoryview(rewards.astype("<f4").tobytes())
        records = np.zeros(len(targets), RECORD)
        records["target"], records["count"] = targets, counts
        ends = 4 * np.cumsum(counts)
        begins = ends - 4 * counts
        records["crc"] = [
            _checksum(target, values[begin:end])
            for target, begin, end in zip(targets, begins, ends, strict=True)
        ]
        with open(self._writer_files.with_suffix(".values"), "ab") as file:
            records["offset"] = file.tell() + begins
            file.write(values)
        with open(self._writer_files.with_suffix(".records"), "ab") as file:
            file.write(records.tobytes())


def _pread(file: int, length: int, offset: int) -> bytes:
    """As os.pread, but nothing at an offset that a damaged record made up."""
    try:
        return os.pread(file, length, offset)
    except OSError:
        return b""


def _checksum(target: np.int64, values: bytes | memoryview) -> int:
    """CRC-32 of a target's index and its rewards."""
    return zlib.crc32(values, zlib.crc32(int(target).to_bytes(8, "little")))
