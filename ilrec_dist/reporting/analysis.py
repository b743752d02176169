"""What `ilrec analyze` found, as tables for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.table import Table

from ilrec_dist.common.console import console

# The figures of a position, in the order of the table, with their titles.
POSITION_FIGURES = {
    "mean_negatives": "|H|",
    "empty": "H empty",
    "candidates": "candidates",
    "plausible": "plausible H",
    "plausible_of_candidates": "plausible candidates",
    "in_beams": "H in beams",
    "in_beams_of_candidates": "candidates in beams",
}
# Begins the key of a layer's agreement with the final one; its number follows.
AGREEMENT = "agreement/layer"
# The terms whose gradient is compared with that of the cross-entropy.
TERMS = {"cpo": "CPO", "cpd": "CPD", "crr": "CRR"}


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def analysis_grids(analysis: Mapping[str, Any]) -> Iterator[Grid]:
    """The tables of an analysis, in reading order."""
    name = f"{analysis['method']}, seed {analysis['seed']}"
    yield _positions(name, analysis["positions"])
    yield _agreement(name, analysis["positions"])
    if "gradients" in analysis:
        yield _gradients(name, analysis["gradients"])
    splits = dict.fromkeys(gain["split"] for gain in analysis["gains"])
    for split in splits:
        yield _gains(analysis, split)


def _positions(name: str, positions: Sequence[Mapping[str, Any]]) -> Grid:
    keys = [key for key in POSITION_FIGURES if key in positions[0]]
    titles = [POSITION_FIGURES[key] for key in keys]
    return Grid(
        f"{name}: by position in the item, over validation targets. Plausible: leads to one of the "
        "collaborative model's top 50 items; in beams: some final beam goes through it.",
        ["position", *titles],
        [[str(row["position"] + 1), *(_number(row[key]) for key in keys)] for row in positions],
    )


def _agreement(name: str, positions: Sequence[Mapping[str, Any]]) -> Grid:
    """A row for each layer, since a model may have many."""
    layers = sorted(
        {int(key.removeprefix(AGREEMENT)) for key in positions[0] if key.startswith(AGREEMENT)},
        reverse=True,
    )
    return Grid(
        f"{name}: the share of rows in which a layer's best continuation is the final layer's, by "
        "position in the item, over validation targets.",
        ["layer", *(f"position {row['position'] + 1}" for row in positions)],
        [
            [str(layer), *(_number(row[f"{AGREEMENT}{layer}"]) for row in positions)]
            for layer in layers
        ],
    )


def _gradients(name: str, gradients: Mapping[str, Any]) -> Grid:
    rows = [("all", gradients["all"])]
    rows += [(str(p + 1), row) for p, row in enumerate(gradients["positions"])]
    return Grid(
        f"{name}: the norm of each term's gradient with its weight, relative to that of the "
        "cross-entropy, on training windows.",
        ["position", "cross-entropy", *TERMS.values()],
        [
            [label, _number(row["cross_entropy"]), *(_number(row[term]) for term in TERMS)]
            for label, row in rows
        ],
    )


def _gains(analysis: Mapping[str, Any], split: str) -> Grid:
    rows = [gain for gain in analysis["gains"] if gain["split"] == split]
    versus = rows[0]["versus"]
    return Grid(
        f"Test NDCG@10 by {split}, with the paired 95 % interval over users.",
        ["users who have", "users", analysis["method"], versus, "difference", "interval"],
        [
            [
                gain["group"],
                f"{gain['users']:,}",
                f"{gain['value']:.4f}",
                f"{gain['versus_value']:.4f}",
                f"{gain['difference']:+.4f}",
                f"[{gain['low']:+.4f}, {gain['high']:+.4f}]",
            ]
            for gain in rows
        ],
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def print_analysis(analysis: Mapping[str, Any]) -> None:
    for grid in analysis_grids(analysis):
        table = Table(title=grid.caption, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for number, title in enumerate(grid.head):
            table.add_column(title, justify="left" if number == 0 else "right")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def analysis_section(analysis: Mapping[str, Any] | None) -> str:
    """The tables as HTML; "" without an analysis."""
    if analysis is None:
        return ""
    return "".join(_html(grid) for grid in analysis_grids(analysis))


def _html(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in grid.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in grid.rows
    )
    return (
        f'<div class="card"><div class="scroll"><table><caption>{escape(grid.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )
