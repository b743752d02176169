"""Sequence models are trained beside the CF
models where `evaluation.baselines` names them.

All baselines are ranked by parts of users.
"""

from __future__ import annotations

import shutil
import typing
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import COUNTER
from ilrec_dist.config.load import config_from_dict
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation import ranking
from ilrec_dist.evaluation.baselines.sequence_models import MODELS
from ilrec_dist.evaluation.baselines.table import BaselineInputs
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.evaluation.ranking import baseline_predictions
from ilrec_dist.pipeline import evaluate_baselines as evaluation
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import execute, open_run
from ilrec_dist.testing.distributed import Mesh, run_distributed
from tests.support.tiny_run import tiny_config

# Of the 150 users of the tiny run with its 60 items: ten chunks, the last one shorter.
CHUNK_USERS = 16


def rank_users(mesh: Mesh, tree: dict, refused_rank: int | None = None) -> str | None:
    """As the workers do. One rank may meet an error of the user's."""
    config = config_from_dict(tree)
    artifacts = RunArtifacts(config)

    def refuse(*_: object, **__: object) -> None:
        raise UserError("popularity: refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK_SCORES", CHUNK_USERS * artifacts.dataset.num_items)
        if mesh.rank == refused_rank:
            patch.setattr(evaluation, "baseline_predictions", refuse)
        try:
            evaluation.evaluate_baselines(config, artifacts, defaultdict(str))
        except UserError as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run whose sequence models are trained beside its CF models."""
    root = tmp_path_factory.mktemp("baselines")
    shutil.copytree(tiny / "tiny", root / "tiny")
    config = tiny_config(root, evaluation={"baselines": ["gru4rec", "caser"]})
    before = (root / "tiny/cf/full.safetensors").stat().st_mtime_ns
    execute(config, "cf")
    assert (root / "tiny/cf/full.safetensors").stat().st_mtime_ns == before
    return config


def test_the_stages_are_there_when_they_are_asked_for(config: Config, tmp_path: Path) -> None:
    choices = typing.get_args(
        typing.get_args(typing.get_type_hints(EvaluationConfig)["baselines"])[0]
    )
    assert tuple(MODELS) == choices
    plain = set(open_run(tiny_config(tmp_path)).stages)
    assert set(open_run(config).stages) - plain == {"baseline gru4rec", "baseline caser"}
    artifacts = RunArtifacts(config)
    for name in MODELS:
        trained = {name: artifacts.folders.baseline(name)}
        predictions = baseline_predictions(
            name,
            BaselineInputs(artifacts.dataset, "test", trained=trained),
            users=artifacts.dataset.evaluated("test"),
            exclude_seen=True,
        )
        assert 0 < predictions.metrics()["hit@10"] < 1


@pytest.mark.slow
def test_workers_rank_together_what_one_ranks_alone(config: Config) -> None:
    """To the bit; what is there is not made again, and a refusal is every worker's."""
    evaluated, tree = RunArtifacts(config).folders.evaluation, config_to_dict(config)
    assert run_distributed(rank_users, 2, 1, tree, 1) == ["popularity: refused"] * 2
    assert not list(evaluated.rglob("predictions*.parquet"))
    assert run_distributed(rank_users, 2, 1, tree) == [None, None]
    together = tables(evaluated)
    assert len(together) == 2 * len(("popularity", "transitions", "sasrec", *MODELS, "bayes"))
    # A file that has lost its end is made again.
    with open(evaluated / "caser/predictions.parquet", "r+b") as file:
        file.truncate(100)
    before = (evaluated / "sasrec/predictions.parquet").stat()
    run_distributed(rank_users, 2, 1, tree)
    after = (evaluated / "sasrec/predictions.parquet").stat()
    assert tables(evaluated) == together
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    shutil.rmtree(evaluated)
    run_distributed(rank_users, 1, 1, tree)
    assert tables(evaluated) == together


def tables(folder: Path) -> dict[str, pa.Table]:
    """All that lies in the evaluation's folder but the progress."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != COUNTER)
    return {path.relative_to(folder).as_posix(): pq.read_table(path) for path in files}
