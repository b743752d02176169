"""What each file of predictions is made with: one that lies in the evaluation's
folder is used while that is the same, whatever else has changed.

The files say it themselves: predictions, and parts of them, in their metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ilrec_dist.common.config_fields import stage_settings
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, sha256_file
from ilrec_dist.common.manifest import MANIFEST, without_checksum
from ilrec_dist.common.run_layout import BEST
from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import from_rank0, is_rank0
from ilrec_dist.evaluation.predictions import read_made_with
from ilrec_dist.pipeline import rankings
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.stage import training_name
from ilrec_dist.pipeline.stages.baselines import baseline_stage
from ilrec_dist.pipeline.stages.evaluate import (
    baselines_in,
    fused_name,
    fusions,
    predictions_file,
    treatments,
    weights_file,
)

# Raised when predictions change for the same settings, by more than their last bits.
FORMAT = 1
# The key of a fusion's weights that has what they were chosen with.
WEIGHTS_MADE_WITH = "made_with"
# Settings that decide which files there are, and those that only some of them are made with. A
# setting that stands in neither counts for every file.
WHICH_FILES = frozenset({"exclude_seen", "fusion"})
OF_SEARCH = frozenset({"beam"})
OF_FUSIONS = frozenset({"fusion_candidates"})


def keep_valid(
    config: Config, artifacts: RunArtifacts, fingerprints: Mapping[str, str]
) -> dict[Path, str]:
    """Remove from the evaluation's folder what this evaluation
    does not make, or makes with something else; collective.

    fingerprints: those of the stages that it stands on. Returns what
    each file of predictions is made with, by its path.
    """
    wanted: dict[Path, str] = {}
    if is_rank0():
        wanted = dict(_wanted(config, artifacts, fingerprints))
        _remove_others(artifacts.folders.evaluation, wanted)
        artifacts.folders.evaluation.mkdir(parents=True, exist_ok=True)
    on_every_rank: dict[Path, str] = from_rank0(wanted)
    return on_every_rank


def _wanted(
    config: Config, artifacts: RunArtifacts, fingerprints: Mapping[str, str]
) -> Iterator[tuple[Path, str]]:
    """Each file of predictions with what it is made with, as JSON.

    That is the fingerprints of the stages that it stands on, the
    hashes of what it reads, and the evaluation's settings.
    """
    folders = artifacts.folders
    of_evaluation: dict[str, Any] = stage_settings(config, "evaluate")["evaluation"]

    @cache
    def sha256(folder: Path) -> str:
        return sha256_file(folder / MANIFEST)

    def made_with(
        stages: Sequence[str], reads: Sequence[Path], exclude: bool, without: frozenset[str]
    ) -> str:
        settings = {key: of_evaluation[key] for key in of_evaluation.keys() - WHICH_FILES - without}
        content = {
            "format": FORMAT,
            "stages": {stage: fingerprints[stage] for stage in stages},
            "sha256": {
                folder.relative_to(folders.root).as_posix(): sha256(folder) for folder in reads
            },
            "settings": settings | {"exclude_seen": exclude},
            "part_users": rankings.part_users(config),
        }
        return json.dumps(content, sort_keys=True)

    for exclude in treatments(config):
        for baseline in baselines_in(config):
            stages, reads = ["prepare"], [folders.data]
            if baseline.is_optional:
                stages.append(baseline_stage(baseline.name))
                reads.append(folders.baseline(baseline.name))
            elif baseline.is_cf:
                stages.append("cf")
                reads.append(folders.cf)
            path = predictions_file(config, baseline.name, None, exclude)
            yield path, made_with(stages, reads, exclude, OF_SEARCH | OF_FUSIONS)
        for method in config.train.methods:
            for seed in config.train.seeds:
                # The training's fingerprint covers the settings of its model and its prompts,
                # their files and the codes.
                stages = ["prepare", training_name(method, seed)]
                reads = [folders.data, folders.items, folders.training(method, seed) / BEST]
                path = predictions_file(config, method, seed, exclude)
                yield path, made_with(stages, reads, exclude, OF_FUSIONS)
                stages, reads = [*stages, "cf"], [*reads, folders.cf]
                for sources in fusions(config):
                    path = predictions_file(config, fused_name(method, sources), seed, exclude)
                    yield path, made_with(stages, reads, exclude, frozenset())


def _remove_others(folder: Path, wanted: Mapping[Path, str]) -> None:
    """Remove the files that are not among the wanted
    ones, their parts or weights, or do not say the same.
    """
    of_parts = {rankings.parts_folder(path): path for path in wanted}
    of_weights = {weights_file(path): path for path in wanted}
    for path in list(folder.rglob("*")):
        if path.is_dir():
            continue
        if path in of_weights:
            said = _weights_made_with(path)
        else:
            said = read_made_with(path)
        owner = of_weights.get(path) or of_parts.get(path.parent, path)
        if said is None or said != wanted.get(owner):
            path.unlink()
    for left in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        # Those that hold something stay.
        with suppress(OSError):
            left.rmdir()


def _weights_made_with(path: Path) -> str | None:
    """What a fusion's weights were chosen with; None where the file is damaged."""
    try:
        content = without_checksum(read_json_object(path))
    except UserError:
        return None
    return None if content is None else content.get(WEIGHTS_MADE_WITH)
