"""Rounds of supervised training and of preferring
the target to the model's own best beam.

SPRec, arXiv 2412.09243 (METHOD.md §11).
"""

from __future__ import annotations

import bisect
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import write_array
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.inference.inputs import HistoryRanges, PlainSequences
from ilrec_dist.inference.ranker import ModelRanker
from ilrec_dist.objective.preference import PreferenceObjective
from ilrec_dist.samples.negatives import KeptNegatives, UniformNegatives, same_tokens
from ilrec_dist.samples.preference_pairs import PreferenceBatchMaker
from ilrec_dist.samples.windows import steps_per_epoch
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.kept_arrays import is_kept, kept_array
from ilrec_dist.training.phases import phase_bounds
from ilrec_dist.training.reference import known_of_targets
from ilrec_dist.training.spec import TrainingSpec

# Beams of a history, of which the best one that is not the target is its negative.
BEAM = 5
# Targets whose beams are in memory at once.
CHUNK_TARGETS = 1 << 16


class SelfPlay:
    """Each round: supervised training, then preference training of the same length.

    The negatives of a round are the model's own best beams at
    the round's middle, and its weights there are the reference.
    Both are computed once and kept in the training's folder.
    """

    def __init__(
        self,
        rounds: int,
        train: TrainConfig,
        evaluation: EvaluationConfig,
        supervised: PreferenceBatchMaker,
        objective: PreferenceObjective,
        spec: TrainingSpec,
        parallel: ParallelState,
    ) -> None:
        """supervised: makes batches of targets alone."""
        self.train, self.evaluation, self.supervised = train, evaluation, supervised
        self.objective, self.spec, self.parallel = objective, spec, parallel
        per_epoch = steps_per_epoch(supervised.windows, train.batch_size)
        self.bounds = phase_bounds(2 * rounds, train.epochs, per_epoch)

    def end(self, step: int) -> int:
        """The step behind the last one of the phase that holds `step`."""
        return self.bounds[self._phase(step) + 1]

    def begin(self, step: int) -> PreferenceBatchMaker:
        """What makes the batches of the phase that holds the step."""
        phase = self._phase(step)
        if phase % 2 == 0:
            return self.supervised
        number = phase // 2
        beams, known = f"self-play-{number}", f"reference-{number}"
        if step != self.bounds[phase]:
            for name in (beams, known):
                self._require_kept(name, step)
        items = kept_array(self.spec.folder, beams, self.spec.fingerprint, self._write_beams)
        base = self.supervised
        negatives = KeptNegatives(
            items,
            base.target_index,
            UniformNegatives(base.dataset, base.trie, 1, self.spec.seed, stream=1 + number),
        )
        maker = PreferenceBatchMaker(
            base.dataset, base.catalogue, base.trie, base.windows, negatives
        )
        maker.known = known_of_targets(
            self.objective,
            maker,
            self.spec.folder,
            known,
            self.spec.fingerprint,
            self.train.batch_size // (self.parallel.dp * self.train.accumulation_steps),
            self.parallel,
        )
        return maker

    def _phase(self, step: int) -> int:
        return bisect.bisect_right(self.bounds, step) - 1

    def _require_kept(self, name: str, step: int) -> None:
        if not is_kept(self.spec.folder, name, self.spec.fingerprint):
            raise UserError(
                f"{self.spec.folder / name}.npy: missing, and the weights that it was made of are "
                f"gone at step {step}; delete {self.spec.folder} and run `ilrec run` again"
            )

    def _write_beams(self, path: Path) -> None:
        """int32 [all targets]: the model's best
        beam that is not the target, -1 for none.
        """
        dataset, windows = self.supervised.dataset, self.supervised.windows
        ranker = ModelRanker(
            self.objective.backbone,
            self.supervised.trie,
            beam=BEAM,
            batch_size=self.evaluation.batch_size,
            softmax_scope=self.objective.softmax_scope,
            inputs=PlainSequences(self.supervised.catalogue, windows.max_history),
            parallel=self.parallel,
            model_name=self.spec.title,
        )
        negatives = np.full(self.supervised.num_targets, -1, np.int32)
        lengths = dataset.train_lengths()
        users = np.repeat(np.arange(dataset.num_users), np.maximum(lengths - 1, 0))
        for first in range(0, len(negatives), CHUNK_TARGETS):
            part = slice(first, first + CHUNK_TARGETS)
            start = dataset.offsets[users[part]]
            positions = np.arange(first, first + len(start)) - self.supervised.target_index(
                users[part], np.ones(len(start), np.int64)
            )
            stop = start + 1 + positions
            targets = np.asarray(dataset.items[stop], np.int64)
            ranked = ranker.rank(
                HistoryRanges(dataset.items, start, stop),
                top=BEAM,
                exclude_seen=self.evaluation.exclude_seen,
            )
            for rows, items in ranked:
                negatives[first + rows] = best_but_target(
                    self.supervised, items.items.astype(np.int64), targets[rows]
                )
        if dist.get_rank() == 0:
            write_array(path, negatives)


def best_but_target(
    maker: PreferenceBatchMaker, items: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """The first item of each list [n, W] whose
    tokens are not the target's [n]; -1 for none.

    Lists end with -1.
    """
    exists = items >= 0
    is_other = exists & ~same_tokens(maker.trie, np.where(exists, items, 0), targets[:, None])
    column = is_other.argmax(axis=1)[:, None]
    best = np.take_along_axis(items, column, axis=1)[:, 0]
    return np.where(is_other.any(axis=1), best, -1)
