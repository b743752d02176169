"""Examples of the report: a few users with history, target and the lists of
each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# History items and beams of a user that are shown.
SHOWN_HISTORY, SHOWN_BEAMS = 20, 10

# (title, Σ log p), best first.
ScoredTitles = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Example:
    """One user for the report.

    Titles are shown as they are. A title that names two items should carry
    the item id, because a beam equal to the target's title counts as the hit.
    """

    user: str
    # Oldest first.
    history: Sequence[str]
    target: str
    # The beams of each model, by its name.
    methods: Mapping[str, ScoredTitles]


def examples_section(examples: Sequence[Example]) -> str:
    """A card for each user."""
    note = (
        '<p class="note">Users of the test split with the first beams of each model; the figure '
        "on the right is Σ log p of the item.</p>"
    )
    return note + "".join(_example(example) for example in examples) if examples else ""


def _example(example: Example) -> str:
    earlier = len(example.history) - SHOWN_HISTORY
    chips = "".join(f"<li>{escape(title)}</li>" for title in example.history[-SHOWN_HISTORY:])
    more = f"<li>… {earlier} earlier</li>" if earlier > 0 else ""
    methods = "".join(
        _beams(name, beams, example.target) for name, beams in example.methods.items()
    )
    return (
        f'<article class="card example"><h3>User {escape(example.user)}</h3>'
        f'<p class="label">History, oldest first</p><ol class="chips">{more}{chips}</ol>'
        '<p class="label">Target</p>'
        f'<ul class="chips"><li class="target">{escape(example.target)}</li></ul>'
        f'<div class="beams">{methods}</div></article>'
    )


def _beams(name: str, beams: ScoredTitles, target: str) -> str:
    rows = []
    for rank, (title, score) in enumerate(beams[:SHOWN_BEAMS], start=1):
        hit = title == target
        mark = '<span class="mark">✓ hit</span>' if hit else ""
        rows.append(
            f"<tr{' class=hit' if hit else ''}><td>{rank}</td>"
            f"<td>{escape(title)}{mark}</td><td>{_signed(score)}</td></tr>"
        )
    head = (
        '<thead class="sr"><tr><th scope="col">rank</th><th scope="col">item</th>'
        '<th scope="col">log p</th></tr></thead>'
    )
    ranks = [rank for rank, (title, _) in enumerate(beams, start=1) if title == target]
    outcome = f"target at rank {ranks[0]}" if ranks else f"target not among the {len(beams)} beams"
    return (
        f'<div><h4>{escape(name)} <span class="note">{outcome}</span></h4>'
        f"<table>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _signed(score: float) -> str:
    return f"{score:.2f}".replace("-", "−")
