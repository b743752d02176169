"""`ilrec recommend --out`: answers a file of histories, here or by the run's workers.

What is interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ilrec_dist import __version__
from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.disk import writing_to
from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.files import file_lock, sha256_file, sha256_json
from ilrec_dist.common.run_layout import BEST, COUNTER, WEIGHTS_SHA256
from ilrec_dist.config.tree import Config
from ilrec_dist.inference.recommend import Request
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.job import Job
from ilrec_dist.launch.workers import run_workers
from ilrec_dist.pipeline.artifacts import config_for_workers
from ilrec_dist.pipeline.recommend_parts import Parts, Written, join_parts, rank_parts
from ilrec_dist.pipeline.records import content_hash, usable_record
from ilrec_dist.pipeline.trained_model import TrainedWeights, loaded_here
from ilrec_dist.reporting.progress import follow_counter, following, stage_progress

# Batches of a part. More would lose more of an interrupted part, and leave more workers without
# work at the end; fewer would be cut up by the lengths of the histories.
PART_BATCHES = 32


def recommend_to(
    out: Path, config: Config, weights: TrainedWeights, request: Request, fusion: str | None
) -> Written:
    """Write the answer to `out`, which appears whole or not at all.

    config: the run's, for its workers. The finished parts lie in a hidden folder beside
    `out` until all are: the same command goes on from them, and one with other weights,
    options or histories drops them. Raises UserError for anything wrong in the
    request's files before anything is ranked.
    """
    num_histories = request.check_files(weights.artifacts.dataset)
    rows = PART_BATCHES * config.evaluation.batch_size
    identity = _identity(weights, request, fusion, rows)
    with _parts_folder(out.absolute(), identity) as folder:
        parts = Parts(request, fusion, str(folder), num_histories, rows)
        missing = parts.missing()
        if len(missing) < parts.count:
            left = parts.histories_of(missing)
            line = f"recommend: goes on, {left:,} of {num_histories:,} users are left"
            console.print(line, highlight=False)
        if missing and config.launch.workers > 1:
            _rank_by_workers(config, weights, parts)
        elif missing:
            with (
                loaded_here(weights) as trained,
                stage_progress("recommend", parts.histories_of(missing), "users") as show,
            ):
                rank_parts(trained, parts, show)
        return join_parts(parts, out)


def _rank_by_workers(config: Config, weights: TrainedWeights, parts: Parts) -> None:
    folder, request = Path(parts.folder), parts.request.with_absolute_paths()
    parts = dataclasses.replace(parts, request=request)
    reads = [str(weights.artifacts.folders.root.resolve()), request.histories]
    reads += [] if request.allowed is None else [request.allowed]
    if weights.config.train.trainable != "full":
        # Most weights are those of the model that the training began with.
        reads.append(str(weights.config.backbone.from_))
    job = Job(
        "ilrec_dist.pipeline.worker_tasks:recommend_parts",
        {
            "config": config_for_workers(config),
            "method": weights.method,
            "seed": weights.seed,
            "parts": dataclasses.asdict(parts),
        },
        str(folder),
        reads,
    )
    follow = partial(follow_counter, folder / COUNTER, "users")
    with following(follow), ray_session(config.launch):
        run_workers(config.launch, job)


def _identity(weights: TrainedWeights, request: Request, fusion: str | None, rows: int) -> str:
    """SHA-256 over all that decides what a part holds."""
    folders, evaluation = weights.artifacts.folders, weights.config.evaluation
    data = usable_record(folders, "prepare")
    made_fusion = usable_record(folders, "evaluate") if fusion is not None else None
    decides = {
        "version": __version__,
        "histories": sha256_file(request.histories),
        "allowed": None if request.allowed is None else sha256_file(request.allowed),
        "top": request.top,
        "exclude_seen": request.exclude_seen,
        "method": weights.method,
        "seed": weights.seed,
        "weights": weights.result[WEIGHTS_SHA256][BEST],
        "model": weights.result["model"],
        "catalogue": weights.result["catalogue"],
        "data": None if data is None else content_hash(data),
        "fusion": [fusion, None if made_fusion is None else content_hash(made_fusion)],
        "beam": evaluation.beam,
        "batch_size": evaluation.batch_size,
        "rows": rows,
    }
    return sha256_json(decides)


@contextmanager
def _parts_folder(out: Path, identity: str) -> Iterator[Path]:
    """The folder for the finished parts of a request, which this command holds.

    It is gone after the block, unless that raises with parts finished or by failed
    workers, whose traceback is in it.
    """
    folder = out.with_name(f".{out.name}.parts-{identity[:16]}")
    try:
        with writing_to(out):
            for other in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
                if other != folder:
                    _drop(other, out)
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    with _held(folder, out):
        try:
            yield folder
        except WorkersFailed:
            raise
        except BaseException:
            if not any(folder.glob("[0-9]*.parquet")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _drop(folder: Path, out: Path) -> None:
    with _held(folder, out):
        shutil.rmtree(folder)
    line = f"{out}: unfinished work of an earlier command is dropped, which had other weights, "
    line += "options or histories"
    print_plain(line)


@contextmanager
def _held(folder: Path, out: Path) -> Iterator[None]:
    """Raises UserError where another command holds the folder."""
    try:
        with file_lock(folder, wait=False):
            yield
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another `ilrec recommend` is writing it; wait for it, or choose "
            "another file"
        ) from None
