"""A checkpoint of a small training, measured: how long it holds the training up, its
bytes, and how long it takes to be read again.

`run_distributed(measure_checkpoint, world_size, tp, StepSpec(…), folder)`
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ilrec_dist.distributed.layout import from_rank0
from ilrec_dist.distributed.process_groups import TIMEOUT_SECONDS
from ilrec_dist.testing.distributed import Mesh
from ilrec_dist.testing.measured_step import SmallTraining, StepSpec
from ilrec_dist.training.checkpoint import CheckpointWriter, committed, latest
from ilrec_dist.training.optimizer_state import restore, take_part

# Steps that are measured alone, after two in which the optimizer makes its state.
STEPS = 6


@dataclass(frozen=True)
class MeasuredCheckpoint:
    # Of a step while nothing is written, and while the checkpoint is.
    step_seconds: float
    writing_step_seconds: float
    # Steps during the writing.
    writing_steps: int
    # While the training waits.
    stall_seconds: float
    # From the beginning until it is committed.
    seconds: float
    # Until weights and optimizer are filled from it, its hashes left out.
    restore_seconds: float
    # On disk, of all ranks.
    bytes: int
    # Trained ones of the whole model, once.
    parameters: int

    @property
    def held_up(self) -> float:
        """Seconds that the checkpoint costs the
        training: waiting, and steps beside the writing.
        """
        slower = max(0.0, self.writing_step_seconds - self.step_seconds)
        return self.stall_seconds + slower * self.writing_steps


def measure_checkpoint(mesh: Mesh, spec: StepSpec, folder: str) -> MeasuredCheckpoint:
    """One checkpoint, with the training going on beside it."""
    training = SmallTraining(mesh, spec)
    target, world = Path(folder), dist.get_world_size()
    writer = CheckpointWriter(target, "measured", 2, mesh.rank, world, TIMEOUT_SECONDS)
    for _ in range(2):
        training.step()
    alone = [_seconds(training.step) for _ in range(STEPS)]
    began = time.perf_counter()
    take = training.engine, training.objective, training.parallel
    stall = _seconds(lambda: writer.begin(STEPS, {}, lambda: take_part(*take)))
    beside = []
    while not _is_committed(target):
        beside.append(_seconds(training.step))
    seconds = time.perf_counter() - began
    writer.wait()
    checkpoint, _ = latest(target, "measured")
    assert checkpoint is not None
    restore_seconds = _seconds(lambda: restore(*take, checkpoint))
    parameters = sum(
        parameter.numel() * (mesh.tp if getattr(parameter, "tensor_model_parallel", False) else 1)
        for parameter in training.objective.parameters()
    )
    training.close()
    return MeasuredCheckpoint(
        step_seconds=statistics.median(alone),
        writing_step_seconds=statistics.median(beside or alone),
        writing_steps=len(beside),
        stall_seconds=stall,
        seconds=seconds,
        restore_seconds=restore_seconds,
        bytes=sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        parameters=parameters,
    )


def _is_committed(folder: Path) -> bool:
    """As rank 0 sees it, so that every rank does as many steps."""
    answer: bool = from_rank0(bool(committed(folder)))
    return answer


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
