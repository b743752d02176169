"""What a stage wrote about its work, as a table of names and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from ilrec_dist.reporting.html.charts import format_number

# Values of a list, and entries of a list of objects, that are written out.
SHOWN_VALUES, SHOWN_ENTRIES = 12, 8


def facts_table(title: str, report: Mapping[str, Any]) -> str:
    """A card with one row a value; nested values have joined names."""
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in _flat(report)
    )
    return (
        f'<div class="card"><table class="facts"><caption>{escape(title)}</caption>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _flat(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in report.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{label} · ")
        elif (
            isinstance(value, list | tuple)
            and len(value) <= SHOWN_ENTRIES
            and all(isinstance(entry, Mapping) for entry in value)
        ):
            for number, entry in enumerate(value, start=1):
                yield (
                    f"{label} {number}",
                    ", ".join(f"{name} {text}" for name, text in _flat(entry)),
                )
        elif isinstance(value, list | tuple) and any(
            isinstance(entry, Mapping | list | tuple) for entry in value
        ):
            yield label, f"{len(value)} entries"
        elif isinstance(value, list | tuple):
            yield (
                label,
                ", ".join(_text(entry) for entry in value[:SHOWN_VALUES])
                + (f", … ({len(value)} values)" if len(value) > SHOWN_VALUES else ""),
            )
        else:
            yield label, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return format_number(value) if isinstance(value, int | float) else str(value)
