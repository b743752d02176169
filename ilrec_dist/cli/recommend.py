"""`ilrec recommend`: a finished run's best weights on new histories, in one process."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from ilrec_dist.common.console import console
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import atomic_file
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.model.config import BackboneConfig
from ilrec_dist.objective.registry import default_method, get_method

if TYPE_CHECKING:
    from ilrec_dist.inference.recommend import Recommendations

PRINTED_USERS = 20


def recommend(
    run: Path,
    histories: Path,
    *,
    top: int,
    out: Path | None,
    method: str | None,
    seed: int | None,
    exclude_seen: bool,
    allowed: Path | None,
) -> None:
    """Recommend with the run in folder `run`.

    Writes Parquet (user, rank, item, title, score) to `out`, or prints the first users. Raises
    UserError for a folder that holds no such trained model, for bad histories and for an unknown
    allowed item.
    """
    config = _config_of(run)
    method = get_method(method or default_method(config.train.methods)).name
    seed = config.train.seeds[0] if seed is None else seed
    if out is not None and not out.parent.is_dir():
        raise UserError(
            f"--out {out}: the folder {out.parent} does not exist; create it or choose another"
        )
    if out is not None and out.is_dir():
        raise UserError(
            f"--out {out}: this is a folder; expected the name of a Parquet file, such as "
            f"{out / 'recommendations.parquet'}"
        )

    from ilrec_dist.launch.device import quiet, resolve_device

    quiet()
    import torch

    from ilrec_dist.common.run_layout import BEST
    from ilrec_dist.distributed.process_groups import destroy_parallel, initialize_parallel
    from ilrec_dist.inference.recommend import recommend_items
    from ilrec_dist.model.weights import load_weights
    from ilrec_dist.pipeline.artifacts import RunArtifacts, build_backbone
    from ilrec_dist.reporting.progress import stage_progress

    artifacts = RunArtifacts(config)
    weights = artifacts.folders.training(method, seed) / BEST
    result = artifacts.trained_model(method, seed)
    model = result[
        "model"
    ]  # as it was trained: a later command may have left another configuration in the folder
    config = dataclasses.replace(
        config,
        backbone=BackboneConfig(**model["backbone"]),
        train=dataclasses.replace(
            config.train, max_history=model["max_history"], precision=model["precision"]
        ),
    )
    device = resolve_device(config.launch)
    if device == "cpu":
        torch.set_num_threads(config.launch.threads or len(os.sched_getaffinity(0)))
    parallel = initialize_parallel(1, device)
    try:
        backbone = load_weights(build_backbone(config, artifacts, seed), weights).to(
            parallel.device
        )
        with stage_progress("recommend", None, "users") as bar:
            recommendations = recommend_items(
                backbone,
                artifacts.dataset,
                artifacts.trie,
                histories=histories,
                top=top,
                beam=config.evaluation.beam,
                batch_size=config.evaluation.batch_size,
                softmax_scope=model["softmax_scope"],
                max_history=config.train.max_history,
                parallel=parallel,
                exclude_seen=exclude_seen,
                allowed=allowed,
                progress=lambda done, _total: bar(done),
                model_name=str(weights),
            )
    finally:
        destroy_parallel()
    table = recommendations.table
    if recommendations.num_users_without_items:
        console.print(
            _without_items(recommendations), highlight=False, markup=False, soft_wrap=True
        )
    if out is None:
        print_recommendations(table)
        return
    import pyarrow.parquet as pq

    try:
        with atomic_file(out) as staged:
            pq.write_table(table, staged)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    console.print(f"{table.num_rows:,} recommendations: {out}", highlight=False, markup=False)


def _config_of(run: Path) -> Config:
    """The run's configuration, pointed at where the folder is now."""
    if not (run / "config.yaml").exists():
        raise UserError(
            f"{run}: not a run folder (no config.yaml); name the folder of a finished `ilrec run`, "
            "such as runs/quickstart"
        )
    folder = run.resolve()
    return dataclasses.replace(
        load_config(run / "config.yaml"), runs_dir=str(folder.parent), name=folder.name
    )


def _without_items(recommendations: Recommendations) -> str:
    """The sentence on users who got an empty list."""
    return (
        f"{recommendations.num_users_without_items:,} of {recommendations.num_users:,} users get "
        "no item: every item that may be recommended stands in their history"
    )


def print_recommendations(found: pa.Table) -> None:
    """Print a table of the first users; titles and ids are shown as they are, with brackets."""
    users = found.column("user").combine_chunks().dictionary_encode()
    shown = found.filter(pc.less(users.indices, PRINTED_USERS))
    table = Table(box=None, pad_edge=False)
    for column in shown.column_names:
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for row in shown.to_pylist():
        table.add_row(
            *(
                Text(text)
                for text in (
                    row["user"],
                    str(row["rank"]),
                    row["item"],
                    row["title"] or "",
                    f"{row['score']:.3f}",
                )
            )
        )
    console.print(table)
    left_out = len(users.dictionary) - PRINTED_USERS
    if left_out > 0:
        console.print(f"and {left_out:,} more users; --out writes them all", highlight=False)


def run(arguments: argparse.Namespace) -> None:
    recommend(
        Path(arguments.run),
        Path(arguments.histories),
        top=arguments.top,
        out=Path(arguments.out) if arguments.out else None,
        method=arguments.method,
        seed=arguments.seed,
        exclude_seen=arguments.exclude_seen,
        allowed=Path(arguments.allowed) if arguments.allowed else None,
    )
