"""`ilrec index report`: what a catalogue's codes look like, as numbers, a line and a
table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.common.manifest import verified
from ilrec_dist.items.catalogue import REPAIR, Catalogue, make_catalogue
from ilrec_dist.items.collisions import collision_report
from ilrec_dist.items.lcrec_index import read_index

# The share of items in collisions above which the user is warned.
WARN_SHARE = 0.1


def code_use(catalogue: Catalogue, level: int) -> np.ndarray:
    """int64 [codes of the level]: items that have each code there; ended titles have
    none.
    """
    numbers = catalogue.vocabulary.numbers(catalogue.tokens[:, level])
    codes = numbers[numbers >= 0] - catalogue.level_starts()[level]
    return np.bincount(codes, minlength=catalogue.level_sizes[level])


def catalogue_report(catalogue: Catalogue) -> dict[str, Any]:
    """Items, size of the vocabulary, and the use of each level's codes.

    Per level: its codes, how many occur, the entropy of their use in bits (at most log2
    of the codes), and the items of the busiest one.
    """
    levels = []
    for level, size in enumerate(catalogue.level_sizes):
        use = code_use(catalogue, level)
        share = use[use > 0] / use.sum()
        levels.append(
            {
                "name": catalogue.level_names[level],
                "codes": size,
                "used": int((use > 0).sum()),
                "entropy_bits": float(-(share * np.log2(share)).sum()) + 0.0,
                "largest": int(use.max()),
            }
        )
    return {"items": catalogue.num_items, "vocab_size": catalogue.vocab_size, "levels": levels}


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report.json that `ilrec index` wrote into `folder`; UserError when it is
    damaged.
    """
    return read_json_object(verified(folder, "report.json", REPAIR))


def open_index(path: str | Path) -> tuple[dict[str, Any], Catalogue]:
    """(report, catalogue) of a run's folder, an index's folder, or a NAME.index.json.

    Raises UserError when it is none of these.
    """
    path = Path(path)
    if path.is_file():
        index = read_index(path)
        catalogue = make_catalogue(index.codes, index.level_sizes, index.level_names)
        shared = collision_report(index.codes)
        collisions = {
            "rule": "keep",
            "before": shared,
            "after": shared,
            "resolved_by": "none",
            "items_changed": 0,
        }
        report = {"source": str(path), **catalogue_report(catalogue), "collisions": collisions}
        return report, catalogue
    folder = path / "items" if (path / "items" / "catalogue.json").exists() else path
    if not (folder / "catalogue.json").exists():
        raise UserError(
            f"{path}: neither a run folder with an index, nor a folder that `ilrec index` wrote, "
            "nor a NAME.index.json"
        )
    catalogue = Catalogue.load(folder)
    return read_report(folder), catalogue


def collision_warning(report: Mapping[str, Any]) -> str | None:
    """One line with what to do, where more than WARN_SHARE of the items share their
    tokens.
    """
    shared = report["collisions"]["after"]
    if shared["share"] <= WARN_SHARE:
        return None
    if "title_tokens" in report:
        advice = "raise items.title_tokens, or give the items titles that differ"
    else:
        advice = "set items.collisions=resolve, or raise items.levels or items.codes_per_level"
    return (
        f"{shared['share']:.1%} of the items share all their tokens with another item, and the "
        f"language model cannot tell them apart; {advice}"
    )


def index_summary(report: Mapping[str, Any]) -> str:
    """One line: how many items, of how many codes, what was left out, and the
    collisions.
    """
    levels, collisions = report["levels"], report["collisions"]
    if "title_tokens" in report:
        parts = [f"{report['items']:,} items, {report['source']}"]
    else:
        sizes = [level["codes"] for level in levels]
        codes = f"{sizes[0]:,}" if len(set(sizes)) == 1 else " + ".join(f"{n:,}" for n in sizes)
        plural = "s" if len(sizes) > 1 else ""
        parts = [f"{report['items']:,} items, {len(sizes)} level{plural} of {codes} codes"]
    if report.get("items_passed_over"):
        parts.append(
            f"{report['items_passed_over']:,} items of items.index passed over, which the data "
            "set does not have"
        )
    if report.get("items_without_text"):
        parts.append(f"{report['items_without_text']:,} items without title and text")
    before, after = collisions["before"], collisions["after"]
    parts.append(f"{after['items']:,} items ({after['share']:.1%}) share all their tokens")
    resolved, would = collisions["resolved_by"], collisions.get("resolve_would", {"how": "none"})
    if resolved == "last level":
        parts[-1] += (
            f" ({before['items']:,}, {before['share']:.1%}, before "
            f"{collisions['items_changed']:,} last codes were reassigned)"
        )
    elif resolved == "extra level":
        parts[-1] += f" ({before['items']:,}, {before['share']:.1%}, before a level was added)"
    elif would["how"] == "last level":
        parts.append(
            f"items.collisions=resolve would give about {would['items']:,} of them other last codes"
        )
    elif would["how"] == "extra level":
        parts.append(f"items.collisions=resolve would add a level of {would['codes']:,} codes")
    return "; ".join(parts)


def report_table(report: dict[str, Any]) -> str:
    """An index's report as plain text: a line a level, then the collisions and their
    resolution.
    """
    lines = [
        f"{report['items']} items, {report['vocab_size']} tokens with padding, "
        f"from {report['source']}",
        "",
        f"{'level':<6}{'codes':>8}{'used':>8}{'entropy':>10}{'of':>8}{'busiest':>9}",
    ]
    for level in report["levels"]:
        lines.append(
            f"{level['name']:<6}{level['codes']:>8}{level['used']:>8}{level['entropy_bits']:>10.2f}"
            f"{np.log2(level['codes']):>8.2f}{level['largest']:>9}"
        )
    collisions = report["collisions"]
    lines.append("")
    for when in ("before", "after"):
        shared = collisions[when]
        lines.append(
            f"collisions {when:<7}{shared['items']:>7} items ({shared['share']:.2%}) share "
            f"{shared['tuples']} tuples, largest group {shared['largest_group']}"
        )
    how = {"last level": "by reassigning the last level", "extra level": "by an extra level"}.get(
        collisions["resolved_by"], "not at all"
    )
    lines.append(
        f"rule {collisions['rule']}; resolved {how}, {collisions['items_changed']} items changed"
    )
    if (warning := collision_warning(report)) is not None:
        lines.append(f"warning: {warning}")
    if "added" in report:
        lines.append(f"{report['added']} items added, no old code changed")
    if report.get("added_without_text"):
        lines.append(
            f"warning: {report['added_without_text']} of them have neither title nor text, so that "
            "their codes say nothing of them"
        )
    return "\n".join(lines)
