"""`ilrec index report`: what the codes of a catalogue look like, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ilrec_dist.data.files import read_json_object
from ilrec_dist.items.catalogue import Catalogue

WIDTH, HEIGHT, MARGIN = 640, 320, 46
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22")


def report_table(folder: str | Path) -> str:
    """The report of a catalogue folder as plain text: a line a level, then collisions before and after."""
    report = read_json_object(Path(folder) / "report.json")
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
    lines.append(f"rule {collisions['rule']}, resolved by {collisions['resolved_by']}, {collisions['items_changed']} items changed")
    return "\n".join(lines)


def report_plot(folder: str | Path, path: str | Path) -> None:
    """An SVG with one curve a level: items per code, codes sorted by use (log scale)."""
    catalogue = Catalogue.load(folder)
    curves = []
    for level, (start, stop) in enumerate(catalogue.level_ranges):
        curves.append(np.sort(np.bincount(catalogue.tokens[:, level] - start, minlength=stop - start))[::-1])
    top = np.log10(max(curve.max() for curve in curves) + 1)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">codes of a level, busiest first (share of the level)</text>',
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">items per code</text>',
    ]
    for power in range(int(top) + 1):
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * np.log10(10**power + 1) / max(top, 1e-9)
        body.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        body.append(f'<text x="{MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{10**power}</text>')
    for level, curve in enumerate(curves):
        x = MARGIN + (WIDTH - 2 * MARGIN) * np.arange(len(curve)) / max(len(curve) - 1, 1)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * np.log10(curve + 1) / max(top, 1e-9)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour = COLOURS[level % len(COLOURS)]
        body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        body.append(f'<text x="{WIDTH - MARGIN + 6}" y="{MARGIN + 16 * level}" fill="{colour}">{catalogue.level_names[level]}</text>')
    Path(path).write_text("\n".join([*body, "</svg>"]) + "\n", encoding="utf-8")
