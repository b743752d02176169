"""`ilrec index report --plot`: a picture of how evenly the codes of a catalogue are
used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.index_report import code_use

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


def plot_code_use(catalogue: Catalogue, path: str | Path) -> None:
    """Write an SVG with one curve a level: items per code, codes sorted by use (log
    scale).
    """
    curves = [np.sort(code_use(catalogue, level))[::-1] for level in range(catalogue.depth)]
    top = np.log10(max(curve.max() for curve in curves) + 1)
    inner_width, inner_height, base = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN, HEIGHT - MARGIN
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        "codes of a level, busiest first (share of the level)</text>",
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {HEIGHT / 2})">items per code</text>',
    ]
    for power in range(int(top) + 1):
        y = base - inner_height * np.log10(10**power + 1) / max(top, 1e-9)
        body += [
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{MARGIN - 4}" y="{y + 4:.1f}" text-anchor="end">{10**power}</text>',
        ]
    for level, curve in enumerate(curves):
        x = MARGIN + inner_width * np.arange(len(curve)) / max(len(curve) - 1, 1)
        y = base - inner_height * np.log10(curve + 1) / max(top, 1e-9)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        colour = COLOURS[level % len(COLOURS)]
        body += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{WIDTH - MARGIN + 6}" y="{MARGIN + 16 * level}" fill="{colour}">'
            f"{catalogue.level_names[level]}</text>",
        ]
    Path(path).write_text("\n".join([*body, "</svg>"]) + "\n", encoding="utf-8")
