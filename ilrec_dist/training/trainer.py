"""The training loop that every worker process runs, whether Ray Train or torchrun started it (METHOD.md §6)."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ilrec_dist.cf.sasrec.checkpoint import catalogue_hash
from ilrec_dist.common.files import write_json
from ilrec_dist.common.run_layout import BEST, FINAL, RESULT
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.model.build import build_backbone, max_positions
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import Objective
from ilrec_dist.objective.metrics import StatisticsSum
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.reporting.metrics_log import MetricsLog
from ilrec_dist.samples.collate import Batch, BatchMaker, Ready, micro_batches, prefetched
from ilrec_dist.samples.windows import EpochSteps, steps_per_epoch, training_windows
from ilrec_dist.training import checkpoint
from ilrec_dist.training.engine import build_engine, learning_rate

LOG_STEPS = 10


@dataclass
class Progress:
    """What a checkpoint carries besides weights and optimizer: the data position and the best validation so far."""

    step: int = 0  # optimizer steps done; the data order is a function of the seed and this
    best_step: int = -1
    best_ndcg: float = -1.0
    validations_without_gain: int = 0
    seconds: float = 0.0  # spent in training, over all attempts


def total_steps(config: Config, artifacts: RunArtifacts) -> int:
    windows = training_windows(artifacts.training, config.train.max_history, config.train.targets)
    return steps_per_epoch(windows, config.train.batch_size) * config.train.epochs


def train(
    config: Config,
    method: str,
    seed: int,
    folder: Path,
    fingerprint: str,
    artifacts: RunArtifacts,
    parallel: ParallelState,
) -> None:
    """Train one method with one seed into `folder`; goes on from its newest checkpoint, if there is one. Nothing when it is finished."""
    lead = dist.get_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    lock = (
        _only_writer(folder) if lead else None
    )  # held to the end; waits for a killed run's last processes, which may finish the training
    if _from_lead((folder / RESULT).exists()):
        return
    objective = get_method(method).objective(config.objective)
    catalogue = artifacts.catalogue
    backbone = build_backbone(
        config.backbone,
        catalogue.vocab_size,
        max_positions(config.train.max_history, catalogue.depth),
        config.train.precision,
        seed,
    )
    module = Objective(
        backbone,
        objective,
        config.backbone.num_layers,
        catalogue.vocab_size,
        catalogue.used_tokens(),
        parallel,
    ).to(parallel.device)
    engine = build_engine(module, config.train, parallel)

    windows = training_windows(artifacts.training, config.train.max_history, config.train.targets)
    epoch_length = steps_per_epoch(windows, config.train.batch_size)
    steps = epoch_length * config.train.epochs
    progress = _resume(engine, folder / "checkpoints", fingerprint, parallel)
    log = MetricsLog(folder, resume_step=progress.step) if lead else None
    if 0 < config.train.patience <= progress.validations_without_gain:
        steps = progress.step  # killed between its early stop and its end

    order = lru_cache(1)(
        partial(EpochSteps, windows, config.train.batch_size, seed)
    )  # of the epoch at hand

    maker = BatchMaker(artifacts.training, catalogue, artifacts.trie, windows)

    def plan() -> Iterator[tuple[np.ndarray, int]]:
        for step in range(progress.step, steps):
            epoch, place = divmod(step, epoch_length)
            numbers = order(epoch)[place]
            rows = maker.num_rows(numbers)
            for part in micro_batches(
                numbers, parallel.dp_rank, parallel.dp, config.train.accumulation_steps
            ):
                yield part, rows

    rewards = (
        artifacts.reward_source() if objective.crr_lambda > 0 and parallel.tp_rank == 0 else None
    )
    layers = [config.backbone.num_layers - 1 - i for i in range(module.num_intermediate)]
    statistics = StatisticsSum(catalogue.depth, len(layers), layers, parallel.device)
    began, timer = time.monotonic(), StepTimer()
    batches = prefetched(plan(), maker.make, rewards)
    module.train()
    for step in range(progress.step, steps):
        rate = learning_rate(config.train, step, steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        for micro in range(config.train.accumulation_steps):
            with timer.part("data"):
                ready = next(batches)
                given = shared_rewards(ready, objective.crr_lambda > 0, parallel)
            batch = ready.batch
            # Dropout is a function of (seed, step, micro-batch, dp rank): equal over tp ranks, and a resumed run draws what the first would have
            torch.manual_seed(
                int(
                    np.random.SeedSequence([seed, step, micro, parallel.dp_rank]).generate_state(
                        1, np.uint64
                    )[0]
                    >> 1
                )
            )
            with timer.part("forward"):
                output = engine(
                    *_tensors(batch, parallel.device),
                    given,
                    parallel.dp * config.train.accumulation_steps / batch.step_rows,
                )
            with timer.part("backward"):
                engine.backward(output.loss)
            statistics.add(output.rows, batch.real_tokens, batch.slots)
            with timer.part("step"):
                engine.step()
        progress.step = step + 1
        end_of_epoch = progress.step % epoch_length == 0
        epoch = progress.step / epoch_length
        if progress.step % LOG_STEPS == 0 or end_of_epoch:
            values = statistics.read(parallel.dp_group, objective.cpd_mu, objective.crr_lambda)
            if rewards is not None:
                values |= {
                    f"rewards/{name}": value for name, value in rewards.meter.summary().items()
                }
            values |= {
                "learning_rate": rate,
                "grad_norm": float(engine.get_global_grad_norm() or 0.0),
            } | timer.rates(values)
            if log is not None:
                log.write(progress.step, epoch, values)
        stop = False
        if end_of_epoch and (
            round(epoch) % config.train.validate_epochs == 0 or progress.step == steps
        ):
            with timer.paused():
                stop = _validate(
                    config, objective, backbone, artifacts, parallel, progress, folder, log, epoch
                )
        if progress.step % config.train.checkpoint_steps == 0 or end_of_epoch or stop:
            with timer.paused():
                progress.seconds += time.monotonic() - began
                began = time.monotonic()
                _save(
                    engine,
                    folder / "checkpoints",
                    progress,
                    fingerprint,
                    config.train.keep_checkpoints,
                )
        if stop:
            break
    batches.close()
    model = {
        "backbone": asdict(config.backbone),
        "softmax_scope": objective.softmax_scope,
        "max_history": config.train.max_history,
    }
    result = {
        "method": method,
        "seed": seed,
        "catalogue": catalogue_hash(catalogue),
        "model": model | {"precision": config.train.precision},
    }
    _finish(backbone, folder, result | asdict(progress), log)
    engine.destroy()  # its hooks and groups outlive it otherwise
    del lock


def shared_rewards(ready: Ready, wanted: bool, parallel: ParallelState) -> torch.Tensor | None:
    """The batch's rewards on every rank of the tp group: its first rank fetched them, the others receive them."""
    if not wanted:
        return None
    size = ready.batch.candidate_tokens.numel()
    values = torch.empty(size)
    if ready.rewards is not None:
        found = np.asarray(ready.rewards.result(), dtype=np.float32)
        values = torch.from_numpy(
            found if ready.batch.scored is None else found[ready.batch.scored]
        )
    values = values.to(parallel.device)
    if parallel.tp > 1:
        dist.broadcast(values, group=parallel.tp_group, group_src=0)
    return values


def _tensors(batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
    parts = (
        batch.tokens,
        batch.rows,
        batch.targets,
        batch.candidate_indptr,
        batch.candidate_tokens,
    )
    return tuple(part.to(device, non_blocking=True) for part in parts)


def _validate(
    config: Config,
    objective: ObjectiveConfig,
    backbone: Backbone,
    artifacts: RunArtifacts,
    parallel: ParallelState,
    progress: Progress,
    folder: Path,
    log: MetricsLog | None,
    epoch: float,
) -> bool:
    """Validation NDCG@10 on the fixed sample; keeps the best weights; says whether patience has run out."""
    backbone.eval()
    found = evaluate_model(
        backbone,
        artifacts.dataset,
        artifacts.catalogue,
        artifacts.trie,
        users=artifacts.validation_users(config.train.validation_users),
        split="validation",
        config=config.evaluation,
        softmax_scope=objective.softmax_scope,
        max_history=config.train.max_history,
        parallel=parallel,
    ).metrics()
    backbone.train()
    better = found["ndcg@10"] > progress.best_ndcg
    if better:
        progress.best_ndcg, progress.best_step, progress.validations_without_gain = (
            found["ndcg@10"],
            progress.step,
            0,
        )
        _save_weights(backbone, folder / BEST)
    else:
        progress.validations_without_gain += 1
    if log is not None:
        log.write(
            progress.step,
            epoch,
            {"validation/ndcg@10": found["ndcg@10"], "validation/hit@10": found["hit@10"]},
        )
    return 0 < config.train.patience <= progress.validations_without_gain


def _save_weights(backbone: Backbone, path: Path) -> None:
    state = backbone.full_state_dict()
    if dist.get_rank() == 0:
        staged = path.with_name(f".{path.name}")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, staged)
        staged.replace(path)
    dist.barrier()


def _save(engine: Any, folder: Path, progress: Progress, fingerprint: str, keep: int) -> None:
    staged = checkpoint.staging_folder(folder, progress.step)
    if dist.get_rank() == 0:
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        staged.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(staged), tag="state", save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoint.commit(folder, progress.step, asdict(progress), fingerprint, keep)
    dist.barrier()


def _from_lead(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _resume(engine: Any, folder: Path, fingerprint: str, parallel: ParallelState) -> Progress:
    """Rank 0 chooses the checkpoint and tells the others, so that all load the same."""
    found = None
    if dist.get_rank() == 0:
        found, damaged = checkpoint.latest(folder, fingerprint)
        for line in damaged:
            print(f"warning: {line}; the checkpoint before it is used", flush=True)
    found = _from_lead(found)
    if found is None:
        return Progress()
    engine.load_checkpoint(str(found.path), tag="state")
    return Progress(**found.state)


def _finish(
    backbone: Backbone, folder: Path, result: dict[str, Any], log: MetricsLog | None
) -> None:
    _save_weights(backbone, folder / FINAL)
    if log is not None:
        log.close()
        write_json(folder / RESULT, result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    dist.barrier()


def _only_writer(folder: Path) -> Any:
    """Hold the folder's lock, which names its holder's process id."""
    handle = open(folder / ".lock", "a+")
    fcntl.flock(handle, fcntl.LOCK_EX)
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


class StepTimer:
    """Wall time of the parts of a step since the last read-out, without validations and checkpoints."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.start = time.monotonic()

    def part(self, name: str) -> _Span:
        return _Span(self, name)

    def paused(self) -> _Span:
        return _Span(self, "paused")

    def rates(self, values: dict[str, float]) -> dict[str, float]:
        """tokens/s, rows/s and the seconds of each part; starts anew."""
        elapsed = time.monotonic() - self.start - self.parts.pop("paused", 0.0)
        rates = {
            "rate/tokens_per_second": values["tokens"] / elapsed,
            "rate/rows_per_second": values["rows"] / elapsed,
            "time/all": elapsed,
        }
        rates |= {f"time/{name}": seconds for name, seconds in self.parts.items()}
        self.parts.clear()
        self.start = time.monotonic()
        return rates


class _Span:
    def __init__(self, timer: StepTimer, name: str):
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.timer.parts[self.name] = (
            self.timer.parts.get(self.name, 0.0) + time.monotonic() - self.began
        )
