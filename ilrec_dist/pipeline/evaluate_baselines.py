"""Ranks with the baselines, in every worker process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from ilrec_dist.config.tree import Config
from ilrec_dist.distributed.layout import refused_together
from ilrec_dist.evaluation.baselines.table import BaselineInputs
from ilrec_dist.evaluation.predictions import join_predictions
from ilrec_dist.evaluation.ranking import baseline_predictions, users_of_rank
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.rankings import RankingsCounter, is_ranked, parts_folder
from ilrec_dist.pipeline.stages.evaluate import baselines_in, predictions_file, treatments


def evaluate_baselines(
    config: Config, artifacts: RunArtifacts, made_with: Mapping[Path, str]
) -> None:
    """Full ranking by every baseline under both treatments of seen items.

    Runs in every worker; each ranks its share of the users, whatever the layout of the
    language model is, and saves them as a part, and rank 0 joins the parts. Predictions
    that are there are not made again. made_with: what `keep_valid` returned.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset, folders = artifacts.dataset, artifacts.folders
    users = artifacts.test_users(config.evaluation.users)
    shares = [users_of_rank(users, dataset.num_items, r, world_size) for r in range(world_size)]
    inputs = BaselineInputs(
        dataset,
        "test",
        folders.cf,
        folders.data,
        {name: folders.baseline(name) for name in config.evaluation.baselines},
    )
    work = [
        (baseline.name, exclude)
        for baseline in baselines_in(config)
        for exclude in treatments(config)
    ]
    for number, (name, exclude) in enumerate(work):
        path = predictions_file(config, name, None, exclude)
        if is_ranked(path):
            continue
        parts = parts_folder(path)
        files = [parts / f"{r:06d}.parquet" for r in range(world_size)]
        before, total = number * len(users), len(work) * len(users)
        counter = RankingsCounter(artifacts, "baselines", name, before, total)
        with refused_together():
            parts.mkdir(parents=True, exist_ok=True)
            if len(shares[rank]):
                baseline_predictions(
                    name,
                    inputs,
                    users=shares[rank],
                    exclude_seen=exclude,
                    progress=counter.of(len(users)),
                ).save(files[rank], made_with[path])
        if rank == 0:
            join_predictions([files[r] for r in range(world_size) if len(shares[r])], path)
            shutil.rmtree(parts)
