"""Trains one method with one seed of a run, in every worker process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ilrec_dist.common.loading import load_function
from ilrec_dist.common.stop_request import StopRequest
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.evaluation.layer_agreement import layer_agreement
from ilrec_dist.evaluation.ranking import evaluate_model
from ilrec_dist.objective.objective import Objective
from ilrec_dist.objective.registry import get_method
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.method_settings import training_settings
from ilrec_dist.pipeline.preference import first_weights, sample_source
from ilrec_dist.pipeline.prompting import input_form, served_prompt, target_batches
from ilrec_dist.pipeline.rankers import evaluation_ranker
from ilrec_dist.pipeline.reward_source import open_reward_source
from ilrec_dist.samples.collate import Batch
from ilrec_dist.samples.targets import ChosenTargets
from ilrec_dist.training.exclusive import exclusive_folder
from ilrec_dist.training.spec import TrainingSpec
from ilrec_dist.training.trainer import LOG_STEPS, Trainer

VALIDATION_METRICS = ("ndcg@10", "hit@10", "users_without_items")
# Validation users on whose targets the layers are compared.
AGREEMENT_USERS = 64


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
    with exclusive_folder(spec.folder, config.launch.lock_seconds) as finished:
        if finished:
            return
        method = get_method(spec.method)
        objective = method.objective(config.objective)
        backbone = first_weights(config, artifacts, method, spec.seed)
        backbone.recompute = config.train.recompute
        backbone.sequence_parallel = config.launch.sequence_parallel
        # A decoder from scratch keeps the bits that it has had without a budget.
        packs = config.train.micro_batch_tokens is not None
        backbone.packs = packs or config.backbone.from_ is not None
        module: Objective = load_function(method.module)(
            backbone,
            objective,
            method.preference(config.preference),
            artifacts.catalogue,
            parallel,
        )

        prompt = served_prompt(config)
        ranker = evaluation_ranker(
            config,
            artifacts,
            backbone,
            softmax_scope=objective.softmax_scope,
            inputs=input_form(config, artifacts, prompt),
            parallel=parallel,
        )
        sample = _agreement_sample(config, artifacts)

        def validate() -> dict[str, float]:
            predictions = evaluate_model(
                ranker,
                artifacts.dataset,
                users=artifacts.validation_users(config.train.validation_users),
                split="validation",
                exclude_seen=config.evaluation.exclude_seen,
            )
            metrics = predictions.metrics() | {
                "users_without_items": float(predictions.num_users_without_items)
            }
            agreement = {
                f"agreement/layer{layer}": float(same.float().mean())
                for layer, same in layer_agreement(backbone, sample, parallel).items()
            }
            return {name: metrics[name] for name in VALIDATION_METRICS} | agreement

        batch_maker, phases = sample_source(config, artifacts, method, spec, module, parallel)
        reads_rewards = method.needs_rewards(config.objective) and parallel.tp_rank == 0
        Trainer(
            spec,
            training_settings(config, method),
            module,
            batch_maker,
            artifacts.catalogue,
            parallel,
            validate,
            open_reward_source(artifacts) if reads_rewards else None,
            prompts=prompt,
            phases=phases,
            stop=StopRequest(spec.folder.parent),
            log_steps=log_steps,
            timeout_seconds=config.launch.timeout_seconds,
            on_checkpoint=on_checkpoint,
        ).train()


def _agreement_sample(config: Config, artifacts: RunArtifacts) -> Batch:
    """The validation targets on which the layers
    are compared; the same for every training.
    """
    users = artifacts.validation_users(AGREEMENT_USERS)
    chosen = ChosenTargets.of_split(
        artifacts.dataset, users, "validation", config.train.max_history
    )
    maker = target_batches(config, artifacts, artifacts.dataset, chosen)
    return maker.make(np.arange(len(users)), 1)
