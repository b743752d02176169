"""`ilrec index report`: what the codes of a catalogue look like, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.items.build import catalogue_report, code_use, read_report
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.collisions import collision_report
from ilrec_dist.items.lcrec_index import read_index

WIDTH, HEIGHT, MARGIN = 640, 320, 46
COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#17becf",
    "#7f7f7f",
    "#bcbd22",
)


def open_index(path: str | Path) -> tuple[dict[str, Any], Catalogue]:
    """(report, catalogue) of a run's folder, of the folder `ilrec index` or `ilrec index add` wrote, or of a NAME.index.json.

    Raises UserError when it is none of these.
    """
    path = Path(path)
    if path.is_file():
        codes, sizes, names = read_index(path)
        catalogue, found = make_catalogue(codes, sizes, names), collision_report(codes)
        collisions = {
            "rule": "keep",
            "before": found,
            "after": found,
            "resolved_by": "none",
            "items_changed": 0,
        }
        return {
            "source": str(path),
            **catalogue_report(catalogue),
            "collisions": collisions,
        }, catalogue
    folder = path / "items" if (path / "items" / "catalogue.json").exists() else path
    if not (folder / "catalogue.json").exists():
        raise UserError(
            f"{path}: neither a run folder with an index, nor a folder that `ilrec index` wrote, nor a NAME.index.json"
        )
    return read_report(folder), Catalogue.load(folder)


def report_table(report: dict[str, Any]) -> str:
    """An index's report as plain text: a line a level, then collisions before and after and what told the items apart."""
    lines = [
        f"{report['items']} items, {report['vocab_size']} tokens with padding, from {report['source']}",
        "",
        f"{'level':<6}{'codes':>8}{'used':>8}{'entropy':>10}{'of':>8}{'busiest':>9}",
    ]
    for level in report["levels"]:
        lines.append(
            f"{level['name']:<6}{level['codes']:>8}{level['used']:>8}{level['entropy_bits']:>10.2f}{np.log2(level['codes']):>8.2f}{level['largest']:>9}"
        )
    collisions = report["collisions"]
    lines.append("")
    for when in ("before", "after"):
        found = collisions[when]
        lines.append(
            f"collisions {when:<7}{found['items']:>7} items ({found['share']:.2%}) share {found['tuples']} tuples, largest group {found['largest_group']}"
        )
    how = {"last level": "by reassigning the last level", "extra level": "by an extra level"}.get(
        collisions["resolved_by"], "not at all"
    )
    lines.append(
        f"rule {collisions['rule']}; resolved {how}, {collisions['items_changed']} items changed"
    )
    if "added" in report:
        lines.append(f"{report['added']} items added, no old code changed")
    return "\n".join(lines)


def report_plot(catalogue: Catalogue, path: str | Path) -> None:
    """An SVG with one curve a level: items per code, codes sorted by use (log scale)."""
    curves = []
    for level in range(catalogue.depth):
        curves.append(np.sort(code_use(catalogue, level))[::-1])
    top = np.log10(max(curve.max() for curve in curves) + 1)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">codes of a level, busiest first (share of the level)</text>',
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">items per code</text>',
    ]
    for power in range(int(top) + 1):
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * np.log10(10**power + 1) / max(top, 1e-9)
        body.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        body.append(f'<text x="{MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{10**power}</text>')
    for level, curve in enumerate(curves):
        x = MARGIN + (WIDTH - 2 * MARGIN) * np.arange(len(curve)) / max(len(curve) - 1, 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * np.log10(curve + 1) / max(top, 1e-9)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour = COLOURS[level % len(COLOURS)]
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        body.append(
            f'<text x="{WIDTH - MARGIN + 6}" y="{MARGIN + 16 * level}" fill="{colour}">{catalogue.level_names[level]}</text>'
        )
    Path(path).write_text("\n".join([*body, "</svg>"]) + "\n", encoding="utf-8")
