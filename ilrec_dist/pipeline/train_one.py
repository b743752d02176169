"""Trains one method with one seed of a run, in every worker process."""

from __future__ import annotations

from collections.abc import Callable

from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts, build_backbone
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.windows import training_windows
from ilrec_dist.training.spec import TrainingSpec
from ilrec_dist.training.trainer import LOG_STEPS, Trainer, exclusive_folder

VALIDATION_METRICS = ("ndcg@10", "hit@10", "users_without_items")


def train_one(
    config: Config,
    spec: TrainingSpec,
    artifacts: RunArtifacts,
    parallel: ParallelState,
    *,
    log_steps: int = LOG_STEPS,
    on_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Train into the spec's folder, going on from its newest checkpoint.

    Does nothing where the training is finished. Collective over all workers.
    """
    with exclusive_folder(spec.folder) as finished:
        if finished:
            return
        method = get_method(spec.method)
        objective = method.objective(config.objective)
        backbone = build_backbone(config, artifacts, spec.seed)

        def validate() -> dict[str, float]:
            predictions = evaluate_model(
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
            )
            metrics = predictions.metrics() | {
                "users_without_items": float(predictions.num_users_without_items)
            }
            return {name: metrics[name] for name in VALIDATION_METRICS}

        windows = training_windows(
            artifacts.training, config.train.max_history, config.train.targets
        )
        reads_rewards = method.needs_rewards(config.objective) and parallel.tp_rank == 0
        Trainer(
            spec,
            config.train,
            method.module(backbone, objective, artifacts.catalogue, parallel),
            BatchMaker(artifacts.training, artifacts.catalogue, artifacts.trie, windows),
            artifacts.catalogue,
            parallel,
            validate,
            artifacts.reward_source() if reads_rewards else None,
            log_steps=log_steps,
            on_checkpoint=on_checkpoint,
        ).train()
