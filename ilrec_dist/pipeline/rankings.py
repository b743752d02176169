"""How far the rankings of the evaluation are."""

from __future__ import annotations

from ilrec_dist.common.run_layout import COUNTER
from ilrec_dist.distributed.layout import is_rank0
from ilrec_dist.inference.ranker import RankingProgress
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.reporting.progress import Count, write_counter


def rankings_counter(
    artifacts: RunArtifacts, title: str, note: str, before: int, total: int, ranks: int
) -> RankingProgress | None:
    """Writes the rankings done so far where the driver reads them, in rank 0.

    before: those done before. The other ranks that share
    the work are taken to have done as many as this one.
    """
    if not is_rank0():
        return None

    def progress(done: int, of_rank: int) -> None:
        count = Count(title, before + min(done, of_rank) * ranks, total, note)
        write_counter(artifacts.folders.evaluation / COUNTER, count)

    return progress
