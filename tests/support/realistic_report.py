"""Made-up but plausible metrics, rows and examples of a run, for the tests of the
report.
"""

from __future__ import annotations

import math
import random
from typing import Any

from ilrec_dist.reporting.html.examples import Example
from ilrec_dist.reporting.results import Interval, MethodLabel

LABELS = [
    MethodLabel("popularity", "popularity"),
    MethodLabel("transitions", "transitions"),
    MethodLabel("sasrec", "sasrec"),
    MethodLabel("sft", "SFT"),
    MethodLabel("ilrec", "ILRec", highlighted=True),
    MethodLabel("bayes", "bayes", is_bound=True),
]
DEPTH, LAYERS, STEPS = 4, (3, 2), 1500
HOSTILE = (
    "<script>alert('x')</script> & \"quotes\" </style></svg>"
    "<img src=http://example.org/x onerror=alert(1)>"
)
TITLES = [
    "Ernie Ball Regular Slinky Nickel Wound Electric Guitar Strings .010–.046",
    "Dunlop Tortex Standard .88 mm Picks, 12 Pack",
    "Shure SM57-LC Cardioid Dynamic Microphone",
    "Hosa CMK-003AU Guitar Patch Cable",
    "Neewer Suspension Boom Scissor Arm Stand",
    "Snark SN-5 Tuner for Guitar, Bass and Violin",
    "Boss TU-3 Chromatic Pedal Tuner",
    "Audio-Technica AT2020 Condenser Microphone",
    "Nady MPF-6 Clamp-On Pop Filter",
    "Donner DP-2 Guitar Power Supply",
    "On-Stage XCG4 Velveteen Padded Tubular Guitar Stand",
    "Behringer U-Phoria UMC22 Audio Interface",
]


def metric_lines(
    method: str, seed: int, steps: int = STEPS, every: int = 10
) -> list[dict[str, Any]]:
    draw = random.Random(f"{method}{seed}")
    ours = method == "ilrec"
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        done = step / steps
        values: dict[str, float] = {}
        cpo = 0.0
        for place in range(DEPTH):
            size = (5.2, 3.4, 1.1, 0.15)[place]
            loss = size * (0.55 + 0.55 * math.exp(-4 * done)) * (1 + draw.gauss(0, 0.02))
            cpo += loss / DEPTH
            values[f"loss/cpo/pos{place}"] = loss
            values[f"p_target/pos{place}"] = min(0.99, math.exp(-loss) + draw.gauss(0, 0.004))
            if ours:
                values[f"loss/cpd/pos{place}"] = (
                    0.4 * size * math.exp(-2 * done) * (1 + draw.gauss(0, 0.05)) / 4
                )
                values[f"loss/crr/pos{place}"] = 0.8 * loss
                values[f"negatives/mean/pos{place}"] = (
                    (48, 11, 1.2, 0.04)[place]
                    * (0.3 + 0.7 * math.exp(-3 * done))
                    * (1 + draw.gauss(0, 0.03))
                )
                values[f"negatives/empty/pos{place}"] = min(
                    1.0, (0.02, 0.2, 0.7, 0.97)[place] + 0.05 * done + draw.gauss(0, 0.004)
                )
                values[f"negatives/capped/pos{place}"] = max(
                    0.0, (0.5, 0.04, 0, 0)[place] * math.exp(-2 * done)
                )
                values[f"negatives/valid_next/pos{place}"] = 1.0
        values["loss/cpo"] = cpo
        values["loss/cpd"] = (
            sum(values.get(f"loss/cpd/pos{place}", 0.0) for place in range(DEPTH)) / DEPTH
        )
        values["loss/crr"] = (
            sum(values.get(f"loss/crr/pos{place}", 0.0) for place in range(DEPTH)) / DEPTH
        )
        values["loss/total"] = cpo + 0.1 * values["loss/cpd"] + 0.02 * values["loss/crr"]
        values["p_target"] = sum(values[f"p_target/pos{place}"] for place in range(DEPTH)) / DEPTH
        if ours:
            for stem in ("mean", "empty", "capped", "valid_next"):
                values[f"negatives/{stem}"] = (
                    sum(values[f"negatives/{stem}/pos{place}"] for place in range(DEPTH)) / DEPTH
                )
            for place, layer in enumerate(LAYERS):
                values[f"kl/layer{layer}"] = (
                    (0.3 + 0.4 * place) * math.exp(-1.5 * done) * (1 + draw.gauss(0, 0.04))
                )
            values["rewards/coverage"] = min(1.0, 0.91 + draw.gauss(0, 0.01))
        values["rate/tokens_per_second"] = (18400 if ours else 24100) * (1 + draw.gauss(0, 0.04))
        values["rate/rows_per_second"] = values["rate/tokens_per_second"] * 0.93
        values["learning_rate"] = 2e-3 * min(1.0, step / 300) * 0.5 * (1 + math.cos(math.pi * done))
        values["grad_norm"] = 0.8 + math.exp(-6 * done) + abs(draw.gauss(0, 0.08))
        lines.append({"step": step, "epoch": 10 * done, "time": 1.7e9 + step * 0.08, **values})
        if step % 150 == 0:
            ndcg = (0.078 + 0.004 * ours) * (1 - math.exp(-3 * done)) + draw.gauss(0, 0.0006)
            lines.append(
                {
                    "step": step,
                    "epoch": 10 * done,
                    "time": 1.7e9 + step * 0.08,
                    "validation/ndcg@10": ndcg,
                    "validation/hit@10": 1.4 * ndcg,
                }
            )
    return lines


def result_rows(seeds: list[int], users: int = 24772) -> list[dict[str, Any]]:
    levels = {
        "popularity": 0.033,
        "transitions": 0.0844,
        "sasrec": 0.069,
        "sft": 0.0792,
        "ilrec": 0.0831,
        "bayes": 0.1192,
    }
    rows = []
    for exclude_seen, factor in ((True, 1.0), (False, 0.96)):
        for method, level in levels.items():
            for seed in seeds if method in ("sft", "ilrec") else seeds[:1]:
                ndcg = level * factor + random.Random(f"{method}{seed}").gauss(0, 0.0006)
                figures = {
                    "hit@1": 0.7 * ndcg,
                    "hit@5": 1.12 * ndcg,
                    "hit@10": 1.35 * ndcg,
                    "ndcg@1": 0.7 * ndcg,
                    "ndcg@5": 0.92 * ndcg,
                    "ndcg@10": ndcg,
                }
                extra = (
                    {f"expected_{metric}": 0.998 * value for metric, value in figures.items()}
                    if exclude_seen
                    else {}
                )
                rows.append(
                    {
                        "method": method,
                        **figures,
                        **extra,
                        "users": users,
                        "seed": seed,
                        "exclude_seen": exclude_seen,
                    }
                )
    return rows


def interval() -> Interval:
    return Interval("ilrec", "sft", "ndcg@10", 0.0039, 0.0021, 0.0058)


def examples() -> list[Example]:
    found = []
    for user in range(5):
        draw = random.Random(user)
        order = draw.sample(TITLES, len(TITLES))
        target = HOSTILE if user == 4 else order[0]
        beams = {}
        for method in ("sft", "ilrec"):
            ranked = draw.sample([target, *order[1:]], 10)
            beams[method] = [(title, -1.2 - 0.4 * place) for place, title in enumerate(ranked)]
        history = [draw.choice(TITLES) for _ in range(24 if user == 2 else 7)]
        found.append(
            Example(user=f"A{user}XK<b>{user}</b>", history=history, target=target, methods=beams)
        )
    return found
