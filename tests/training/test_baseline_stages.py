"""Sequence models are trained beside the CF
models where `evaluation.baselines` names them.
"""

from __future__ import annotations

import shutil
import typing

from ilrec_dist.evaluation.baselines.sequence_models import MODELS
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.evaluation.ranking import baseline_predictions
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute, open_run
from tests.support.tiny_run import tiny_config


def test_the_stages_are_there_when_they_are_asked_for(tiny, tmp_path):
    choices = typing.get_args(
        typing.get_args(typing.get_type_hints(EvaluationConfig)["baselines"])[0]
    )
    assert tuple(MODELS) == choices
    shutil.copytree(tiny / "tiny", tmp_path / "tiny")
    config = tiny_config(tmp_path, evaluation={"baselines": ["gru4rec", "caser"]})
    plain = set(open_run(tiny_config(tmp_path)).stages)
    assert set(open_run(config).stages) - plain == {"baseline gru4rec", "baseline caser"}
    before = (tmp_path / "tiny/cf/full.safetensors").stat().st_mtime_ns
    execute(config, "cf")
    assert (tmp_path / "tiny/cf/full.safetensors").stat().st_mtime_ns == before
    artifacts = RunArtifacts(config)
    for name in MODELS:
        predictions = baseline_predictions(
            name,
            artifacts.dataset,
            users=artifacts.dataset.evaluated("test"),
            split="test",
            exclude_seen=True,
            trained={name: artifacts.folders.baseline(name)},
        )
        assert 0 < predictions.metrics()["hit@10"] < 1
