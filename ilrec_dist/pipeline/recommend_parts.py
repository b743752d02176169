"""The parts of a large answer.

Each is ranked by one data-parallel rank, and is a file when it is finished.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.disk import writing_to
from ilrec_dist.common.files import atomic_file
from ilrec_dist.common.parquet import is_whole_parquet, read_checked, write_checked
from ilrec_dist.distributed.layout import from_rank0, is_rank0
from ilrec_dist.inference.recommend import SCHEMA, Recommender, Request
from ilrec_dist.launch.job import is_refused
from ilrec_dist.pipeline.fusion import open_fusion
from ilrec_dist.pipeline.trained_model import TrainedModel

# Rows of the answer that are written as one row group.
ROW_GROUP = 1 << 17


@dataclass(frozen=True)
class Parts:
    """A request whose histories are answered part by part; JSON values."""

    request: Request
    # What the model is mixed with (see `open_fusion`); None: nothing.
    fusion: str | None
    # Where the finished parts lie.
    folder: str
    num_histories: int
    # Histories of a part.
    rows: int

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Parts:
        return Parts(**(tree | {"request": Request(**tree["request"])}))

    @property
    def count(self) -> int:
        return -(-self.num_histories // self.rows)

    def path(self, number: int) -> Path:
        return Path(self.folder) / f"{number:06d}.parquet"

    def missing(self) -> list[int]:
        """The parts that are not finished."""
        return [number for number in range(self.count) if not is_whole_parquet(self.path(number))]

    def histories_of(self, numbers: list[int]) -> int:
        """How many histories these parts have."""
        return sum(min(self.rows, self.num_histories - number * self.rows) for number in numbers)


def rank_parts(trained: TrainedModel, parts: Parts, progress: Callable[[int], None]) -> None:
    """Rank the missing parts; every data-parallel rank takes its share of them.

    A part's batches are the same whoever ranks it. progress: called with the
    histories that are done, where the other ranks are taken to be as far as this one.
    """
    parallel = trained.parallel
    # One list for all, whatever each would see.
    missing = from_rank0(parts.missing() if is_rank0() else [])
    assigned = missing[parallel.dp_rank :: parallel.dp]
    if not assigned:
        return
    alone = dataclasses.replace(trained, parallel=dataclasses.replace(parallel, dp=1, dp_rank=0))
    ranker = alone.ranker if parts.fusion is None else open_fusion(alone, parts.fusion)
    recommender = Recommender(ranker, trained.artifacts.dataset, parts.request)
    done = 0
    for number, histories in recommender.histories.parts(parts.rows, set(assigned)):
        # No collective tells this rank that another one has met an error.
        if parallel.dp > 1 and is_refused(Path(parts.folder)):
            return

        def show(ranked: int, _total: int, before: int = done) -> None:
            progress((before + ranked) * parallel.dp)

        table = recommender.table(histories, show)
        done += len(histories.users)
        if parallel.tp_rank == 0:
            with atomic_file(parts.path(number)) as staged:
                write_checked(table, staged)
        if number == assigned[-1]:
            return


@dataclass(frozen=True)
class Written:
    """What was written."""

    rows: int
    users: int
    # Those with an empty list: every item that may be recommended stands in their history.
    users_without_items: int


def join_parts(parts: Parts, out: Path) -> Written:
    """Write all parts as one file, in the order of the histories."""
    rows = users_with_items = 0
    pending: list[pa.Table] = []
    # Among the parts, whose folder is emptied by the next command where this one is killed.
    joined = Path(parts.folder) / "joined.parquet"
    with writing_to(out):
        with pq.ParquetWriter(joined, SCHEMA, write_page_checksum=True) as writer:
            for number in range(parts.count):
                again = "give the same command again"
                table = read_checked(parts.path(number), "a part of the answer", again)
                pending.append(table)
                rows += table.num_rows
                users_with_items += pc.sum(pc.equal(table.column("rank"), 1)).as_py() or 0
                if sum(part.num_rows for part in pending) >= ROW_GROUP or number == parts.count - 1:
                    group = pa.concat_tables(pending)
                    writer.write_table(group, row_group_size=max(1, group.num_rows))
                    pending = []
        os.replace(joined, out)
    return Written(rows, parts.num_histories, parts.num_histories - users_with_items)
