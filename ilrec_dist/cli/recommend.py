"""`ilrec recommend`: a finished run's best weights on new histories."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from ilrec_dist.common.console import console, print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.terminal import written_out
from ilrec_dist.inference.recommend import Recommender, Request
from ilrec_dist.pipeline.fusion import open_fusion
from ilrec_dist.pipeline.recommend import recommend_to
from ilrec_dist.pipeline.run_config import run_config
from ilrec_dist.pipeline.trained_model import TrainedWeights, find_trained, loaded_here

PRINTED_USERS = 20


def recommend(
    run: Path,
    request: Request,
    *,
    out: Path | None,
    method: str | None,
    seed: int | None,
    fusion: str | None,
    launch_settings: Sequence[str] = (),
) -> None:
    """Recommend with the run in folder `run`.

    Writes Parquet (user, rank, item, title, score) to `out`, or prints the first users.
    fusion: what the model is mixed with (see `open_fusion`); None: nothing. Raises
    UserError for a folder that holds no such trained model or fusion, for bad histories
    and for an unknown allowed item.
    """
    if out is not None:
        _require_a_file(out)
    config = run_config(run, launch_settings)
    weights = find_trained(config, method, seed)
    if out is None:
        show_first(weights, request, fusion)
        return
    written = recommend_to(out, config, weights, request, fusion)
    _say_without_items(written.users_without_items, written.users)
    console.print(f"{written.rows:,} recommendations: {out}", highlight=False, markup=False)


def _require_a_file(out: Path) -> None:
    if not out.parent.is_dir():
        raise UserError(
            f"--out {out}: the folder {out.parent} does not exist; create it or choose another"
        )
    if out.is_dir():
        raise UserError(
            f"--out {out}: this is a folder; expected the name of a Parquet file, such as "
            f"{out / 'recommendations.parquet'}"
        )


def show_first(weights: TrainedWeights, request: Request, fusion: str | None) -> None:
    """Print a table of the first users, after all histories were checked."""
    dataset = weights.artifacts.dataset
    num_users = request.check_files(dataset)
    with loaded_here(weights) as trained:
        ranker = trained.ranker if fusion is None else open_fusion(trained, fusion)
        recommender = Recommender(ranker, dataset, request)
        _, first = next(recommender.histories.parts(PRINTED_USERS))
        table = recommender.table(first)
    shown = len(first.users)
    _say_without_items(shown - table.column("rank").to_pylist().count(1), shown)
    print_recommendations(table, num_users - shown)


def _say_without_items(count: int, users: int) -> None:
    if count:
        line = f"{count:,} of {users:,} users get no item: every item that may be recommended "
        line += "stands in their history"
        print_plain(line)


def print_recommendations(recommendations: pa.Table, left_out: int) -> None:
    """Print a table, and how many users are left out.

    Titles and ids are shown as they are, with brackets,
    and their control characters are written out.
    """
    table = Table(box=None, pad_edge=False)
    for column in recommendations.column_names:
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for row in recommendations.to_pylist():
        table.add_row(
            *(
                Text(written_out(text))
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
    if left_out:
        console.print(f"and {left_out:,} more users; --out writes them all", highlight=False)


def run(arguments: argparse.Namespace) -> None:
    recommend(
        Path(arguments.run),
        Request(arguments.histories, arguments.top, arguments.exclude_seen, arguments.allowed),
        out=Path(arguments.out) if arguments.out else None,
        method=arguments.method,
        seed=arguments.seed,
        fusion=arguments.fusion,
        launch_settings=arguments.overrides,
    )
