"""Opens a fusion that the evaluation of a run made: `ilrec recommend --fusion`
(METHOD.md §12).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.evaluation.fusion_ranking import FusedRanker
from ilrec_dist.pipeline.evaluate_trained import FUSION_SOURCES
from ilrec_dist.pipeline.records import check_stands_on, usable_record, verify_output
from ilrec_dist.pipeline.stages.evaluate import (
    FUSION_SUFFIX,
    FUSIONS,
    fused_name,
)
from ilrec_dist.pipeline.trained_model import TrainedModel

# The value of --fusion that takes the fusion of the most sources.
WIDEST = "widest"


def open_fusion(trained: TrainedModel, fusion: str = WIDEST) -> FusedRanker:
    """The mixture of a trained model with the sources that `fusion` names, such as
    "cf".

    Its weights were chosen on validation by the run's evaluation, for lists with
    and without seen items. Raises UserError where that made no such fusion, and
    where it stands on other data or models than lie in the run's folder now.
    """
    names = ["+".join(sources) for sources in FUSIONS]
    if fusion != WIDEST and fusion not in names:
        raise UserError(
            f"--fusion {fusion}: expected {' or '.join(names)}, or no value for the widest one"
        )
    folders = trained.artifacts.folders
    record = usable_record(folders, "evaluate")
    for sources in reversed(FUSIONS):
        if fusion not in (WIDEST, "+".join(sources)):
            continue
        folder = f"{fused_name(trained.method, sources)}-seed{trained.seed}"
        files = [
            name
            for name in (record["files"] if record is not None else ())
            if name.startswith(f"{folder}/") and name.endswith(FUSION_SUFFIX)
        ]
        if files and record is not None:
            check_stands_on(folders, "evaluate", [*record["inputs"], "index", "prepare", "cf"])
            verify_output(folders, "evaluate", files)
            return _fused_ranker(trained, sources, files)
    raise UserError(
        f"{folders.root}: its evaluation has no fusion of {trained.method} seed {trained.seed}"
        f"{'' if fusion == WIDEST else f' with {fusion}'}; run `ilrec evaluate CONFIG "
        "evaluation.fusion=true` to make it, or leave --fusion out"
    )


def _fused_ranker(trained: TrainedModel, sources: tuple[str, ...], files: list[str]) -> FusedRanker:
    saved = [read_json_object(trained.artifacts.folders.evaluation / name) for name in files]
    weights = {
        bool(entry["exclude_seen"]): np.array(
            [entry["weights"][name] for name in (trained.method, *sources)]
        )
        for entry in saved
    }
    # As evaluated: the run's configuration may have been changed since.
    model = dataclasses.replace(trained.ranker, beam=int(saved[0]["beam"]))
    return FusedRanker(
        model,
        [FUSION_SOURCES[name](trained.artifacts) for name in sources],
        weights,
        int(saved[0]["candidates"]),
    )
