"""The rankings of the evaluation: what an interrupted one has saved of them is gone on
with, part by part, and how far they are is counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch.distributed as dist

from ilrec_dist.common.files import sha256_file, write_text
from ilrec_dist.common.manifest import MANIFEST
from ilrec_dist.common.parquet import is_whole_parquet
from ilrec_dist.common.run_layout import BEST, COUNTER, MADE_WITH
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import from_rank0, is_rank0
from ilrec_dist.evaluation.predictions import Predictions, join_predictions
from ilrec_dist.inference.ranker import RankingProgress
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.reporting.counter import Count, write_counter

# Users that are ranked before their predictions are saved: all that an interruption loses, and
# all whose lists are in memory. With fewer, more batches would be short of users, for each has
# histories of one length.
PART_USERS = 1 << 14


class RankUsers(Protocol):
    """Ranks some users in one or several ways, and counts the users it has ranked."""

    def __call__(
        self, *, users: np.ndarray, progress: RankingProgress | None
    ) -> Sequence[Predictions]: ...


@dataclass(frozen=True)
class RankingsCounter:
    """Writes the rankings done so far where the driver reads them, in rank 0."""

    artifacts: RunArtifacts
    # What is done, and by what.
    title: str
    note: str
    # The rankings done before, and those of all that has this title.
    before: int
    total: int

    def of(self, size: int, more: int = 0) -> RankingProgress | None:
        """Counts those of a part of `size` rankings that comes after as many `more`.

        The ranks share them, and are all taken to be as far as this one.
        """
        if not is_rank0():
            return None

        def progress(done: int, of_rank: int) -> None:
            so_far = self.before + more + size * done // of_rank
            count = Count(self.title, so_far, self.total, self.note)
            write_counter(self.artifacts.folders.evaluation / COUNTER, count)

        # The time of the first of them counts too.
        progress(0, 1)
        return progress


def drop_rankings_of_others(config: Config, artifacts: RunArtifacts) -> None:
    """Remove what an interrupted evaluation made with other weights, codes or data than
    those that lie in the run's folder now; collective.
    """
    if is_rank0():
        folders = artifacts.folders
        made_with = [folders.data, folders.items, folders.cf]
        made_with += [folders.baseline(name) for name in config.evaluation.baselines]
        made_with += [
            folders.training(method, seed) / BEST
            for method in config.train.methods
            for seed in config.train.seeds
        ]
        hashes = {
            path.relative_to(folders.root).as_posix(): sha256_file(path / MANIFEST)
            for path in made_with
        }
        text = json.dumps({"part_users": PART_USERS, "sha256": hashes}, indent=2) + "\n"
        note = folders.evaluation / MADE_WITH
        if not note.exists() or note.read_text(encoding="utf-8", errors="replace") != text:
            shutil.rmtree(folders.evaluation, ignore_errors=True)
            folders.evaluation.mkdir(parents=True)
            write_text(note, text)
        # Of a process that was killed while it wrote.
        for leftover in folders.evaluation.rglob(".*.writing-*"):
            leftover.unlink(missing_ok=True)
    dist.barrier()


def parts_folder(path: Path) -> Path:
    """Where the parts of predictions lie until all are there."""
    return path.with_name(f".{path.name}.parts")


def is_ranked(path: Path) -> bool:
    """Whether the predictions are there, whole; the same on every rank."""
    exists: bool = from_rank0(is_rank0() and is_whole_parquet(path))
    if exists and is_rank0():
        # Of a process that ended when it had joined them.
        shutil.rmtree(parts_folder(path), ignore_errors=True)
    return exists


def rank_in_parts(
    paths: Sequence[Path], users: np.ndarray, rank: RankUsers, counter: RankingsCounter
) -> None:
    """Rank `users`, ascending, and write the predictions of each way to its path.

    Collective; PART_USERS are ranked at a time, and rank 0 saves them. Parts that an
    interrupted call has saved are not ranked again.
    """
    starts = range(0, len(users), PART_USERS)
    # The files of each part, one a path.
    parts = [
        [parts_folder(path) / f"{number:06d}.parquet" for path in paths]
        for number in range(len(starts))
    ]
    # One list for all, whatever each would see.
    finished: list[bool] = from_rank0(
        [is_rank0() and all(is_whole_parquet(file) for file in files) for files in parts]
    )
    for files, start, is_finished in zip(parts, starts, finished, strict=True):
        if is_finished:
            continue
        part = users[start : start + PART_USERS]
        ranked = rank(users=part, progress=counter.of(len(part), start))
        if is_rank0():
            for file, predictions in zip(files, ranked, strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                predictions.save(file)
    if is_rank0():
        for path, of_path in zip(paths, zip(*parts, strict=True), strict=True):
            join_predictions(of_path, path)
            shutil.rmtree(parts_folder(path))
