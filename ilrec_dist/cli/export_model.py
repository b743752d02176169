"""`ilrec export`: a trained model as a folder that transformers or PEFT loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.export.hf_model import Decoding, export_adapter, export_model
from ilrec_dist.export.merge import merge_rounded
from ilrec_dist.inference.inputs import HistoryRanges
from ilrec_dist.pipeline.trained_model import TrainedModel, open_trained_model

# Histories of validation users whose logits tell how far rounding moves them.
SAMPLE_USERS = 16


def run(arguments: argparse.Namespace) -> None:
    out, dtype = Path(arguments.out), getattr(torch, arguments.dtype)
    method, seed = arguments.method, arguments.seed
    with open_trained_model(Path(arguments.run), method, seed, exact=True) as trained:
        artifacts, backbone = trained.artifacts, trained.backbone
        if arguments.merge and backbone.lora is None:
            raise UserError(
                f"--merge: {trained.weights} has no adapters to merge (train.trainable "
                f"{trained.config.train.trainable}); leave --merge out"
            )
        if out.exists():
            raise UserError(f"{out}: already exists; choose a folder to create")
        decoding = Decoding(trained.config.evaluation.beam, trained.softmax_scope)
        items = artifacts.dataset, artifacts.catalogue, artifacts.trie, decoding
        base = trained.config.backbone.from_
        language_model = None if base is None else artifacts.language_model
        if backbone.lora is not None and not arguments.merge:
            assert base is not None and language_model is not None
            export_adapter(out, backbone, *items, dtype, language_model, base, trained.prompt)
        else:
            if arguments.merge:
                _merge(trained, dtype)
            export_model(out, backbone, *items, dtype, language_model, trained.prompt)
    console.print(f"exported: {out}", highlight=False, markup=False)


def _merge(trained: TrainedModel, dtype: torch.dtype) -> None:
    """Merge the adapters, and print what the rounding costs."""
    dataset = trained.artifacts.dataset
    users = trained.artifacts.validation_users(SAMPLE_USERS)
    histories = HistoryRanges(dataset.items, dataset.offsets[users], dataset.offsets[users + 1])
    sequences: list[torch.Tensor] = []
    for rows in trained.inputs.batches(histories, SAMPLE_USERS):
        prefixes = trained.inputs.prefixes(histories, rows)
        lengths = [prefixes.tokens.shape[1]] * len(rows)
        if prefixes.lengths is not None:
            lengths = prefixes.lengths.tolist()
        sequences += [row[:n] for row, n in zip(prefixes.tokens, lengths, strict=True)]
    shift = merge_rounded(trained.backbone, dtype, sequences)
    if shift is not None:
        print_plain(
            f"merged in fp32 and rounded to {str(dtype).removeprefix('torch.')} once: this moves "
            f"the logits by {shift.by_rounding:.2%} of their norm, the adapters move them by "
            f"{shift.by_adapters:.2%} ({len(sequences)} users)"
        )
