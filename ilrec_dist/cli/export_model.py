"""`ilrec export`: a trained model as a folder that transformers or PEFT loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.export.hf_model import Decoding, ModelParts, export_adapter, export_model
from ilrec_dist.export.logit_shift import logit_shift
from ilrec_dist.export.tensor_rows import AdapterTensors, MergedTensors, StoredTensors
from ilrec_dist.inference.inputs import HistoryRanges
from ilrec_dist.pipeline.backbones import shapes_of_backbone
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.pipeline.trained_model import TrainedWeights, find_trained, one_process

# Histories of validation users whose logits tell how far rounding moves them.
SAMPLE_USERS = 16


def run(arguments: argparse.Namespace) -> None:
    out, dtype = Path(arguments.out), getattr(torch, arguments.dtype)
    weights = find_trained(run_config(Path(arguments.run)), arguments.method, arguments.seed)
    trainable, base = weights.config.train.trainable, weights.config.backbone.from_
    has_adapters = trainable.startswith("lora")
    if arguments.merge and not has_adapters:
        raise UserError(
            f"--merge: {weights.folder} has no adapters to merge (train.trainable {trainable}); "
            "leave --merge out"
        )
    if out.exists():
        raise UserError(f"{out}: already exists; choose a folder to create")
    artifacts = weights.artifacts
    parts = ModelParts(
        artifacts.dataset,
        artifacts.catalogue,
        artifacts.trie,
        Decoding(weights.config.evaluation.beam, weights.softmax_scope),
        None if base is None else artifacts.language_model,
        weights.prompt,
    )
    with one_process(weights.config.launch) as parallel:
        backbone, plan = shapes_of_backbone(weights.config, artifacts, weights.seed)
        if plan is None:
            export_model(out, backbone, StoredTensors(backbone, weights.folder), parts, dtype)
        elif has_adapters and not arguments.merge:
            adapters = AdapterTensors(backbone, weights.folder)
            export_adapter(out, backbone, adapters, parts, dtype, str(base))
        else:
            merged = MergedTensors(backbone, plan, weights.folder)
            # In fp32 nothing is rounded away.
            if arguments.merge and dtype != torch.float32:
                histories = _histories(weights)
                shift = logit_shift(merged, plan, backbone, dtype, histories, parallel.device)
                print_plain(
                    f"merged in fp32 and rounded to {arguments.dtype} once: this moves the logits "
                    f"by {shift.by_rounding:.2%} of their norm, the adapters move them by "
                    f"{shift.by_adapters:.2%} ({len(histories)} users)"
                )
            export_model(out, backbone, merged, parts, dtype)
    console.print(f"exported: {out}", highlight=False, markup=False)


def _histories(weights: TrainedWeights) -> list[torch.Tensor]:
    """What the model reads of some validation users, int64 [S] each."""
    dataset, inputs = weights.artifacts.dataset, weights.inputs
    users = weights.artifacts.validation_users(SAMPLE_USERS)
    histories = HistoryRanges(dataset.items, dataset.offsets[users], dataset.offsets[users + 1])
    sequences: list[torch.Tensor] = []
    for rows in inputs.batches(histories, SAMPLE_USERS):
        prefixes = inputs.prefixes(histories, rows)
        lengths = [prefixes.tokens.shape[1]] * len(rows)
        if prefixes.lengths is not None:
            lengths = prefixes.lengths.tolist()
        sequences += [row[:n] for row, n in zip(prefixes.tokens, lengths, strict=True)]
    return sequences
