"""`ilrec recommend`: a finished run's best weights on new histories, in one process."""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from ilrec_dist.common.console import console
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import atomic_file
from ilrec_dist.inference.recommend import Recommendations, recommend_items
from ilrec_dist.pipeline.fusion import open_fusion
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.reporting.progress import stage_progress

PRINTED_USERS = 20


def recommend(
    run: Path,
    histories: Path,
    *,
    top: int,
    out: Path | None,
    method: str | None,
    seed: int | None,
    fusion: str | None,
    exclude_seen: bool,
    allowed: Path | None,
) -> None:
    """Recommend with the run in folder `run`.

    Writes Parquet (user, rank, item, title, score) to `out`, or prints the first users.
    fusion: what the model is mixed with (see `open_fusion`); None: nothing. Raises
    UserError for a folder that holds no such trained model or fusion, for bad histories
    and for an unknown allowed item.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(
            f"--out {out}: the folder {out.parent} does not exist; create it or choose another"
        )
    if out is not None and out.is_dir():
        raise UserError(
            f"--out {out}: this is a folder; expected the name of a Parquet file, such as "
            f"{out / 'recommendations.parquet'}"
        )
    with (
        open_trained_model(run, method, seed) as trained,
        stage_progress("recommend", None, "users") as show_progress,
    ):
        recommendations = recommend_items(
            trained.ranker if fusion is None else open_fusion(trained, fusion),
            trained.artifacts.dataset,
            histories=histories,
            top=top,
            exclude_seen=exclude_seen,
            allowed=allowed,
            progress=lambda done, _total: show_progress(done),
        )
    table = recommendations.table
    if recommendations.num_users_without_items:
        console.print(
            _without_items(recommendations), highlight=False, markup=False, soft_wrap=True
        )
    if out is None:
        print_recommendations(table)
        return
    try:
        with atomic_file(out) as staged:
            pq.write_table(table, staged)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    console.print(f"{table.num_rows:,} recommendations: {out}", highlight=False, markup=False)


def _without_items(recommendations: Recommendations) -> str:
    """The sentence on users who got an empty list."""
    return (
        f"{recommendations.num_users_without_items:,} of {recommendations.num_users:,} users get "
        "no item: every item that may be recommended stands in their history"
    )


def print_recommendations(recommendations: pa.Table) -> None:
    """Print a table of the first users; titles
    and ids are shown as they are, with brackets.
    """
    users = recommendations.column("user").combine_chunks().dictionary_encode()
    shown = recommendations.filter(pc.less(users.indices, PRINTED_USERS))
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
        fusion=arguments.fusion,
        exclude_seen=arguments.exclude_seen,
        allowed=Path(arguments.allowed) if arguments.allowed else None,
    )
