"""`ilrec export`: a trained model as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ilrec_dist.common.console import console
from ilrec_dist.export.hf_model import export_model
from ilrec_dist.pipeline.trained_model import open_trained_model


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    with open_trained_model(Path(arguments.run), arguments.method, arguments.seed) as trained:
        artifacts = trained.artifacts
        export_model(
            out,
            trained.backbone,
            artifacts.dataset,
            artifacts.catalogue,
            artifacts.trie,
            getattr(torch, arguments.dtype),
            None if trained.config.backbone.from_ is None else artifacts.language_model,
            trained.prompt,
        )
    console.print(f"exported: {out}", highlight=False, markup=False)
