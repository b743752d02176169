"""The rankings of the evaluation: what an interrupted one has saved of them is gone on
with, part by part, and how far they are is counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ilrec_dist.common.parquet import is_whole_parquet
from ilrec_dist.common.run_layout import COUNTER
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import from_rank0, is_rank0
from ilrec_dist.evaluation.predictions import Predictions, join_predictions
from ilrec_dist.inference.ranker import RankingProgress
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.reporting.counter import Count, write_counter

# Users that are ranked before their predictions are saved: all that an interruption loses, and
# all whose lists are in memory. With fewer, more batches would be short of users, for each has
# histories of one length. Of a pretrained model it is this share of them: one of 135 million
# weights ranks some ten users a second on a CPU.
PART_USERS, PRETRAINED_SHARE = 1 << 14, 16


def part_users(config: Config) -> int:
    """The users of a part."""
    if config.backbone.from_ is None:
        return PART_USERS
    return -(-PART_USERS // PRETRAINED_SHARE)


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


def parts_folder(path: Path) -> Path:
    """Where the parts of predictions lie until all are there."""
    return path.with_name(f".{path.name}.parts")


def is_ranked(path: Path, *beside: Path) -> bool:
    """Whether the predictions are there, whole, and files
    beside them that they need; the same on every rank.
    """
    exists: bool = from_rank0(
        is_rank0() and is_whole_parquet(path) and all(file.exists() for file in beside)
    )
    if exists and is_rank0():
        # Of a process that ended when it had joined them.
        shutil.rmtree(parts_folder(path), ignore_errors=True)
    return exists


def rank_in_parts(
    made_with: Mapping[Path, str], users: np.ndarray, rank: RankUsers, counter: RankingsCounter
) -> None:
    """Rank `users`, ascending, and write the predictions of each way
    to its path, with what they are made with.

    Collective; those of a part are ranked at a time, and rank 0 saves them.
    Parts that an interrupted call has saved are not ranked again.
    """
    size = part_users(counter.artifacts.config)
    starts = range(0, len(users), size)
    # The files of each part, one a path.
    parts = [
        [parts_folder(path) / f"{number:06d}.parquet" for path in made_with]
        for number in range(len(starts))
    ]
    # One list for all, whatever each would see.
    finished: list[bool] = from_rank0(
        [is_rank0() and all(is_whole_parquet(file) for file in files) for files in parts]
    )
    for files, start, is_finished in zip(parts, starts, finished, strict=True):
        if is_finished:
            continue
        part = users[start : start + size]
        ranked = rank(users=part, progress=counter.of(len(part), start))
        if is_rank0():
            for file, predictions, text in zip(files, ranked, made_with.values(), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                predictions.save(file, text)
    if is_rank0():
        for path, of_path in zip(made_with, zip(*parts, strict=True), strict=True):
            join_predictions(of_path, path)
            shutil.rmtree(parts_folder(path))
