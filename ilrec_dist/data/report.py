"""What `prepare` tells its user.

Items without a text, and a summary of what was dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.reading.source import Source


def match_items(
    item_ids: pa.Array, kept: np.ndarray, table: pa.Table | None, source: Source
) -> tuple[pa.Table, dict[str, Any] | None]:
    """(id, title, text) of the kept items, null where unknown, and how ids and rows
    match.

    item_ids: of all items that were read; kept: bool, those that the k-core leaves.
    Raises UserError when no kept item has a row.
    """
    ids = item_ids.filter(pa.array(kept)).cast(pa.string())
    if table is None or table.num_rows == 0:
        nothing = pa.nulls(len(ids), pa.string())
        return pa.table({"id": ids, "title": nothing, "text": nothing}), None
    table = table.combine_chunks()
    row_ids = table.column("id").combine_chunks().cast(pa.string())
    row = pc.index_in(ids, value_set=row_ids)
    without_item = pc.invert(pc.is_in(row_ids, value_set=item_ids.cast(pa.string())))
    match: dict[str, Any] = {
        "rows": len(row_ids),
        "items_without_row": row.null_count,
        "rows_without_item": pc.sum(without_item).as_py(),
    }
    if 2 * row.null_count > len(ids):
        match["an_item_without_row"] = ids.filter(pc.is_null(row))[0].as_py()
        unused = row_ids.filter(without_item)
        match["a_row_without_item"] = unused[0].as_py() if len(unused) else None
    if row.null_count == len(ids):
        raise UserError(
            f"{source.item_file}: no item of the {len(ids):,} in {source.main_file} has a row "
            f"here: items are such as {match['an_item_without_row']!r}, rows such as "
            f"{row_ids[0].as_py()!r}; write the ids in one way"
        )
    columns = {name: table.column(name).take(row).combine_chunks() for name in ("title", "text")}
    return pa.table({"id": ids, **columns}), match


def summary_line(manifest: dict[str, Any]) -> str:
    """One line of what was read, what was dropped and why, and what is kept."""
    kept = _counts(manifest)
    if "read" not in manifest:
        return f"{manifest['format']}: generated {kept}"
    read = manifest["read"]
    parts = [f"{manifest['format']}: read {_counts(read)}", *_dropped(manifest), f"kept {kept}"]
    if (match := manifest.get("item_table")) is not None:
        parts.append(_matched(match, manifest["items"]))
    return "; ".join([*parts, *manifest.get("notes", ())])


def _dropped(manifest: dict[str, Any]) -> list[str]:
    """What was dropped and why, where something was."""
    read, core = manifest["read"], manifest["k_core"]
    reasons = {
        "bad rows (rejects.jsonl)": read["bad_rows"],
        "exact repeats": read["repeats_dropped"],
        "users without interactions": read["users_without_interactions"],
    }
    parts = [f"{count:,} {reason}" for reason, count in reasons.items() if count]
    users, items = core["users_removed"], core["items_removed"]
    if users or items:
        users_before = users + manifest["users"]
        items_before = items + manifest["items"]
        interactions = core["interactions_removed"]
        parts.append(
            f"{users:,} users ({users / users_before:.0%}) and {items:,} items "
            f"({items / items_before:.0%}) with {interactions:,} interactions below the k-core "
            f"({core['min_user_interactions']} per user, {core['min_item_interactions']} per item)"
        )
    return [f"dropped {', '.join(parts)}"] if parts else []


def _matched(match: dict[str, Any], items: int) -> str:
    if not match["items_without_row"] and not match["rows_without_item"]:
        return "every item has a row in the item table"
    text = (
        f"{match['items_without_row']:,} of {items:,} items have no row in the item table, "
        f"{match['rows_without_item']:,} of its {match['rows']:,} rows no item"
    )
    if "an_item_without_row" in match:
        text += f" (no row: {match['an_item_without_row']!r}"
        if match["a_row_without_item"] is not None:
            text += f", no item: {match['a_row_without_item']!r}"
        text += ")"
    return text


def _counts(counts: dict[str, Any]) -> str:
    return (
        f"{counts['interactions']:,} interactions of {counts['users']:,} users "
        f"and {counts['items']:,} items"
    )
