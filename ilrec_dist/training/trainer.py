"""The training loop that every worker process runs (METHOD.md §6)."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.cf.rewards.futures import RewardSource
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import Stopped, UserError
from ilrec_dist.common.files import sha256_file, write_json
from ilrec_dist.common.run_layout import BASE_SHA256, BEST, FINAL, RESULT, WEIGHTS_SHA256
from ilrec_dist.common.stop_request import StopRequest
from ilrec_dist.distributed.layout import ParallelState, from_rank0, is_rank0
from ilrec_dist.distributed.process_groups import TIMEOUT_SECONDS
from ilrec_dist.items.catalogue import Catalogue, catalogue_hash
from ilrec_dist.model.weights import manifest_is, save_training_weights
from ilrec_dist.objective.objective import Objective
from ilrec_dist.reporting.metrics_log import METRICS_FILE, METRICS_SHA256, VALIDATION, MetricsLog
from ilrec_dist.samples.prefetch import (
    BatchSource,
    PrefetchedBatch,
    micro_batch_plan,
    prefetch,
)
from ilrec_dist.samples.windows import StepOrder
from ilrec_dist.training import bad_steps, checkpoint
from ilrec_dist.training.accumulation import StepBatches
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.early_end import EarlyEnd
from ilrec_dist.training.engine import build_engine, set_learning_rate
from ilrec_dist.training.gpu_rates import GPURates
from ilrec_dist.training.optimizer_state import restore, take_part
from ilrec_dist.training.phases import Phases
from ilrec_dist.training.schedule import learning_rate
from ilrec_dist.training.spec import TrainingSpec
from ilrec_dist.training.timer import StepTimer
from ilrec_dist.training.weight_ranges import own_part
from ilrec_dist.training.whole_weights import forget_engine, whole_weights

# Optimizer steps between two lines of metrics.jsonl.
LOG_STEPS = 10
# The validation metric that chooses the best weights.
SELECTION_METRIC = "ndcg@10"
DIVERGED = "the training has diverged; lower train.learning_rate or lengthen train.warmup"


@dataclass
class TrainingProgress:
    """What a checkpoint carries besides weights and optimizer."""

    # Optimizer steps done. The data order is a function of the seed and this.
    step: int = 0
    best_step: int = -1
    best_ndcg: float = -1.0
    # SHA-256 of the best weights' manifest, known to rank 0.
    best_sha256: str = ""
    validations_without_gain: int = 0
    # Time spent in training, over all attempts.
    seconds: float = 0.0


class Trainer:
    """Trains one method with one seed; every rank has one, and all call `train`.

    `config` is the section `train`. `objective` is the module that is trained, and
    takes the batches that `batch_maker` makes of its samples. `validate` returns the
    validation metrics of the backbone, the same on every rank, SELECTION_METRIC among
    them. `rewards` is read on the first rank of each tensor-parallel group and may be
    None elsewhere, or where the objective needs none. `prompts` is what the result
    keeps of the samples' prompts. With `phases` the batches of each phase come from its
    own batch maker. Where `stop` asks for it, the training ends after a checkpoint. One
    may take `timeout_seconds` to be written, and `on_checkpoint` is called with the
    step after each one is committed.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        config: TrainConfig,
        objective: Objective,
        batch_maker: BatchSource,
        catalogue: Catalogue,
        parallel: ParallelState,
        validate: Callable[[], Mapping[str, float]],
        rewards: RewardSource | None = None,
        *,
        prompts: dict[str, Any] | None = None,
        phases: Phases | None = None,
        stop: StopRequest | None = None,
        log_steps: int = LOG_STEPS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        on_checkpoint: Callable[[int], None] | None = None,
    ) -> None:
        self.spec, self.config, self.batch_maker = spec, config, batch_maker
        self.prompts, self.stop, self.early_end = prompts, stop, EarlyEnd(stop)
        self.catalogue, self.parallel, self.validate = catalogue, parallel, validate
        self.phases, self.phase_end = phases, 0
        self.rewards, self.log_steps, self.on_checkpoint = rewards, log_steps, on_checkpoint
        self.objective = objective.to(parallel.device)
        self.backbone = objective.backbone
        self.engine = build_engine(objective, config, parallel)
        self.order = StepOrder(batch_maker.samples, config.batch_size, config.epochs, spec.seed)
        self.total_steps = self.order.total_steps
        self.statistics = objective.make_statistics(catalogue.depth)
        self.progress = TrainingProgress()
        self.writer = checkpoint.CheckpointWriter(
            self._checkpoints,
            spec.fingerprint,
            config.keep_checkpoints,
            dist.get_rank(),
            dist.get_world_size(),
            timeout_seconds,
        )
        self.log: MetricsLog | None = None
        self.timer = StepTimer()
        # The learning rate of the step at hand.
        self.rate = 0.0
        # The steps that were left out since the last good one.
        self.bad_steps: list[int] = []
        # When the seconds of the progress were last counted.
        self._since = time.monotonic()

    def train(self) -> None:
        """Go on from the newest checkpoint to the last step, or till patience runs out.

        Raises Stopped where it was asked to end; the newest checkpoint has all of it.
        """
        try:
            self._require_steps()
            self._resume()
            with self.stop.listening() if self.stop is not None and is_rank0() else nullcontext():
                self._train_to_the_end()
            self._finish()
        finally:
            # The engine's hooks and process groups would outlive it otherwise.
            self.engine.destroy()
            forget_engine(self.engine)

    def _require_steps(self) -> None:
        if self.total_steps == 0:
            raise UserError(
                f"{self.spec.title}: no user has two training items, so there is nothing to "
                "train on; lower data.min_user_interactions or bring more data"
            )

    def _train_to_the_end(self) -> None:
        self.objective.train()
        self._since = time.monotonic()
        between = self.config.steps_between_checkpoints
        is_due = False
        self.gpu_rates = GPURates(self.objective, self.config, self.catalogue, self.progress.step)
        # A checkpoint is there before the validation of its step, which may take longer than the
        # command waits after SIGTERM.
        self._validate_if_due()
        batches = self._begin_phase()
        while not self._is_done():
            if self.progress.step == self.phase_end:
                batches.close()
                batches = self._begin_phase()
            self.train_step(batches)
            self.writer.check()
            end_of_epoch = self.progress.step % self.order.steps_per_epoch == 0
            is_logged = self.progress.step % self.log_steps == 0 or end_of_epoch
            if is_logged:
                self._log_step()
            must_stop = self.early_end.is_due(is_logged)
            if must_stop and not is_logged:
                self._log_step()
            is_due |= self.progress.step % between == 0 or end_of_epoch or must_stop
            # What stands between a good step and a bad one is not worth going on from.
            if is_due and not self.bad_steps:
                with self.timer.pause():
                    self._save_checkpoint()
                is_due = False
            if must_stop:
                batches.close()
                self._end_early()
            self._validate_if_due()
        batches.close()

    def train_step(self, batches: Iterator[PrefetchedBatch]) -> None:
        """One optimizer step on the next micro-batches: L = L_CPO + μ·L_CPD + λ·L_CRR.

        Each term is a sum over the rows of the step divided by their number N, over
        all ranks and micro-batches. The engine averages over both, hence the scale.
        A step whose loss or gradient is not finite on any rank is left out by all.
        """
        step = self.progress.step
        statistics: list[tuple[Any, int, torch.Tensor | None]] = []
        self._set_learning_rate(learning_rate(self.config, step, self.total_steps))
        self.objective.begin_step(step, self.total_steps)
        with self.timer.part("data"):
            micro_batches = StepBatches(batches, self.batch_maker, self.config, self.parallel)
        for micro in range(micro_batches.count):
            with self.timer.part("data"):
                prefetched = micro_batches.next(self.engine)
                batch, rewards = prefetched.batch, self._rewards_of(prefetched)
            self._seed_dropout(micro)
            with self.timer.part("forward"):
                output = self.engine(
                    *batch.model_inputs(self.parallel.device),
                    rewards=rewards,
                    loss_scale=self.parallel.dp * micro_batches.divisor / batch.step_rows,
                )
            with self.timer.part("backward"):
                self.engine.backward(bad_steps.poisoned(output.loss))
            statistics.append((output.rows, batch.num_tokens, batch.grid_index))
            with self.timer.part("step"):
                self.engine.step()
        self.progress.step = step + 1
        if self.engine.optimizer.overflow:
            self._skip_bad_step([rows for rows, *_ in statistics])
            return
        self.bad_steps.clear()
        for parts in statistics:
            self.statistics.add(*parts)

    def _skip_bad_step(self, rows: Sequence[Any]) -> None:
        """Count a step that every rank left out.
        Raises UserError after too many in a row.
        """
        term = bad_steps.term_in_words(rows)
        self.bad_steps.append(self.progress.step)
        most = self.config.max_bad_steps
        if len(self.bad_steps) > most:
            which = "" if most == 0 else f", as in each of the {most} steps before"
            raise UserError(f"{self._where()}: {term}{which}: {DIVERGED}")
        if is_rank0():
            line = f"warning: {self._where()}: {term}; the step is left out"
            print(f"{line} ({len(self.bad_steps)} in a row of at most {most})", flush=True)

    def _begin_phase(self) -> Any:
        """A generator of this rank's micro-batches
        from the current step to the phase's end.
        """
        self.phase_end = self.total_steps
        if self.phases is not None and not self._is_done():
            with self.timer.pause(), whole_weights(self.engine):
                self.batch_maker = self.phases.begin(self.progress.step)
            self.phase_end = self.phases.end(self.progress.step)
        plan = micro_batch_plan(
            self.order,
            self.batch_maker,
            self.progress.step,
            self.phase_end,
            self.config.accumulation_steps,
            self.parallel,
            self.config.micro_batch_tokens,
        )
        return prefetch(plan, self.batch_maker.make, self.rewards)

    def _rewards_of(self, prefetched: PrefetchedBatch) -> torch.Tensor | None:
        if not self.objective.needs_rewards:
            return None
        return prefetched.reward_tensor(self.parallel)

    def _set_learning_rate(self, rate: float) -> None:
        self.rate = rate
        set_learning_rate(self.engine, rate)

    def _seed_dropout(self, micro: int) -> None:
        """Make dropout a function of (seed, step, micro-batch, data-parallel rank).

        It is then equal over the ranks of a tensor-parallel group, unless each of them
        has tokens of its own, and a resumed training draws what an uninterrupted one
        would have.
        """
        entropy = [self.spec.seed, self.progress.step, micro, self.parallel.dp_rank]
        if self.backbone.sequence_parallel:
            entropy.append(self.parallel.tp_rank)
        (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        torch.manual_seed(int(state >> 1))

    def _is_done(self) -> bool:
        out_of_patience = 0 < self.config.patience <= self.progress.validations_without_gain
        return self.progress.step >= self.total_steps or out_of_patience

    @property
    def _epoch(self) -> float:
        """Epochs done, as the log gives them."""
        return self.progress.step / self.order.steps_per_epoch

    # Logging and validation

    def _log_step(self) -> None:
        """Log the means since the last line. Raises
        UserError where a loss is not finite.
        """
        values = self.statistics.report(self.parallel.dp_group)
        if values["rows"] == 0 and self.bad_steps:
            # Nothing was learned since the last line.
            return
        if self.rewards is not None:
            summary = self.rewards.meter.summary()
            values |= {f"rewards/{name}": value for name, value in summary.items()}
        values["learning_rate"] = self.rate
        values["grad_norm"] = float(self.engine.get_global_grad_norm() or 0.0)
        values |= self.timer.report(values["tokens"], values["rows"])
        values |= self.gpu_rates.report(values, self.progress.step)
        if self.log is not None:
            self.log.write(self.progress.step, self._epoch, values)
        for term in (*self.objective.terms, "total"):
            self._require_finite(f"the loss term {term}", values[f"loss/{term}"])

    def _validate_if_due(self) -> None:
        epoch, within = divmod(self.progress.step, self.order.steps_per_epoch)
        due = epoch % self.config.validate_epochs == 0 or self.progress.step == self.total_steps
        if self.progress.step > 0 and within == 0 and due:
            with self.timer.pause(), whole_weights(self.engine):
                self._validate()

    def _validate(self) -> None:
        """Keep the weights where they are the best
        so far; count the validations without gain.
        """
        self._require_finite_weights()
        self.backbone.eval()
        try:
            metrics = self.validate()
        except UserError as error:
            raise UserError(f"{self._where()}: {error}") from None
        self.backbone.train()
        for name, value in metrics.items():
            self._require_finite(f"validation {name}", value)
        progress = self.progress
        if metrics[SELECTION_METRIC] > progress.best_ndcg:
            progress.best_ndcg = metrics[SELECTION_METRIC]
            progress.best_step = progress.step
            progress.validations_without_gain = 0
            progress.best_sha256 = save_training_weights(self.backbone, self.spec.folder / BEST)
        else:
            progress.validations_without_gain += 1
        if self.log is not None:
            values = {f"{VALIDATION}{name}": value for name, value in metrics.items()}
            self.log.write(progress.step, self._epoch, values)

    def _require_finite(self, what: str, value: float) -> None:
        """UserError unless the value, the same on every rank, is finite."""
        if not math.isfinite(value):
            raise UserError(f"{self._where()}: {what} is {value}: {DIVERGED}")

    def _require_finite_weights(self) -> None:
        """UserError, on every rank, where a weight of any rank is not finite."""
        parts = (own_part(weight) for weight in self.backbone.parameters())
        flags = [torch.isfinite(part).all() for part in parts]
        finite = torch.stack(flags).all().to(torch.int32)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise UserError(f"{self._where()}: a weight is not finite: {DIVERGED}")

    def _where(self) -> str:
        return f"{self.spec.title}: step {self.progress.step} (learning rate {self.rate:g})"

    # Checkpoints and results

    def _resume(self) -> None:
        """Load the newest undamaged checkpoint,
        if there is one; the same on every rank.
        """
        newest = None
        if is_rank0():
            newest, damaged = checkpoint.latest(self._checkpoints, self.spec.fingerprint)
            for line in damaged:
                if line not in self.spec.reported_damage:
                    print(f"warning: {line}; the checkpoint before it is used", flush=True)
            if newest is not None and not manifest_is(
                self.spec.folder / BEST, newest.state["best_sha256"]
            ):
                # They are of a validation after the checkpoint, which comes again and keeps its
                # weights, whatever the rounding of another layout makes of its metric.
                newest.state["best_ndcg"] = -1.0
        newest = from_rank0(newest)
        if newest is not None:
            restore(self.engine, self.objective, self.parallel, newest)
            self.progress = TrainingProgress(**newest.state)
        if is_rank0():
            self.log = MetricsLog(self.spec.folder, self.progress.step, self.config.tracker)

    @property
    def _checkpoints(self) -> Path:
        return self.spec.folder / "checkpoints"

    def _save_checkpoint(self) -> None:
        """Copy this rank's part of a checkpoint of
        this step, to be written beside the training.

        Raises UserError where the loss is not finite, and what the one before has met.
        """
        if not self.statistics.is_finite(self.parallel.dp_group):
            self._log_step()
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self._since = now
        self.writer.begin(
            self.progress.step,
            asdict(self.progress),
            lambda: take_part(self.engine, self.objective, self.parallel),
        )
        if self.on_checkpoint is not None:
            self.writer.wait()
            dist.barrier()
            self.on_checkpoint(self.progress.step)

    def _end_early(self) -> None:
        """Leave the newest checkpoint committed, and raise Stopped."""
        self.writer.wait()
        if self.log is not None:
            self.log.close(finished=False)
        dist.barrier()
        raise Stopped(f"{self.spec.title}: asked to end after step {self.progress.step}")

    def _finish(self) -> None:
        """Write the final weights and result.json,
        which marks the training as finished.
        """
        self.writer.wait()
        self._require_finite_weights()
        with whole_weights(self.engine):
            final_sha256 = save_training_weights(self.backbone, self.spec.folder / FINAL)
        if self.log is not None:
            self.log.close()
            write_json(self.spec.folder / RESULT, self._result(final_sha256))
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        dist.barrier()

    def _result(self, final_sha256: str) -> dict[str, Any]:
        progress = asdict(self.progress)
        best_sha256 = progress.pop("best_sha256")
        trained: dict[str, Any] = {"trainable": self.config.trainable}
        if self.backbone.lora is not None:
            trained["lora"] = config_to_dict(self.config.lora)
        if self.backbone.base_sha256 is not None:
            trained[BASE_SHA256] = self.backbone.base_sha256
        return {
            "method": self.spec.method,
            "seed": self.spec.seed,
            "catalogue": catalogue_hash(self.catalogue),
            "model": {
                "backbone": config_to_dict(self.backbone.config),
                "softmax_scope": self.objective.softmax_scope,
                "max_history": self.config.max_history,
                "precision": self.config.precision,
                "prompts": self.prompts,
                **trained,
            },
            WEIGHTS_SHA256: {BEST: best_sha256, FINAL: final_sha256},
            METRICS_SHA256: sha256_file(self.spec.folder / METRICS_FILE),
            **progress,
        }
