"""Trainings in a process of their own, whose backbone is looked at afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ilrec_kernels import cross_layer_loss

from ilrec_dist.config.load import config_from_dict
from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
from ilrec_dist.model import packing
from ilrec_dist.model.gpt import Backbone
from ilrec_dist.objective.config import ObjectiveConfig
from ilrec_dist.objective.ilrec import loss_options
from ilrec_dist.pipeline import train_one
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.backbones import initial_backbone
from ilrec_dist.testing.distributed import Mesh
from ilrec_dist.training.spec import TrainingSpec


def train(
    mesh: Mesh,
    tree: dict[str, Any],
    folder: str,
    stop_after: int | None = None,
    least_padding: float = packing.LEAST_PADDING,
) -> dict[str, int]:
    """Train with cross-entropy; the number of the
    decoder's values that were changed, by name.
    """

    def stop(step: int) -> None:
        if stop_after is not None and step >= stop_after:
            raise InterruptedError

    torch.set_num_threads(1)
    config = config_from_dict(tree)
    artifacts, trained = RunArtifacts(config), []

    def build(*arguments: Any) -> Backbone:
        trained.append(original(*arguments))
        return trained[0]

    parallel = initialize_parallel(mesh.tp, "cpu")
    original, train_one.first_weights = train_one.first_weights, build
    usual, packing.LEAST_PADDING = packing.LEAST_PADDING, least_padding
    try:
        spec = TrainingSpec("sft", 0, Path(folder), "test")
        train_one.train_one(config, spec, artifacts, parallel, log_steps=1, on_checkpoint=stop)
        before = dict(initial_backbone(config, artifacts, 0).gpt.named_parameters())
        trained[0].write_trained_rows()
        return {
            name: int((parameter != before[name]).sum())
            for name, parameter in trained[0].gpt.named_parameters()
        }
    except InterruptedError:
        return {}
    finally:
        train_one.first_weights, packing.LEAST_PADDING = original, usual
        destroy_parallel()


def gradients(mesh: Mesh, tree: dict[str, Any], trainable: str) -> dict[str, torch.Tensor]:
    """Of ILRec's loss on some tokens: this rank's gradients of all that is trained."""
    config = config_from_dict(tree | {"train": tree["train"] | {"trainable": trainable}})
    artifacts = RunArtifacts(config)
    initialize_parallel(mesh.tp, "cpu")
    try:
        backbone = initial_backbone(config, artifacts, 0)
        catalogue = artifacts.catalogue
        first, stop = catalogue.vocabulary.added_tokens
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(0, stop, (4, 9), generator=generator)
        tokens[:, ::2] = torch.randint(first, stop, (4, 5), generator=generator)
        hidden = backbone(tokens, torch.arange(36), 2)
        objective = ObjectiveConfig(negative_scope="all", distill_scope="all", crr_lambda=0.0)
        cross_layer_loss(
            hidden.final,
            hidden.layers,
            backbone.head_weight,
            tokens.roll(-1).flatten(),
            None,
            None,
            loss_options(objective, catalogue.vocab_size, catalogue.used_tokens()),
            vocab=backbone.vocab_range,
            trainable_rows=backbone.trainable_head_rows,
            trained_rows=backbone.trained_head_rows,
            tp_group=mesh.tp_group if mesh.tp > 1 else None,
        ).loss.backward()
        low, high = (
            min(max(edge, backbone.vocab_range[0]), backbone.vocab_range[1])
            - backbone.vocab_range[0]
            for edge in (first, stop)
        )
        found = {
            name: parameter.grad
            for name, parameter in backbone.named_parameters()
            if parameter.grad is not None
        }
        for name, table in backbone.vocabulary_tables.items():
            rows = None if table.grad is None else table.grad[low:high]
            if backbone.trained_rows is not None:
                rows = backbone.trained_rows.weights[name].grad[: high - low]
            if rows is not None:
                found[f"rows/{name}"] = rows
        return found
    finally:
        destroy_parallel()
