"""The generated shop, which is not read but written (`ilrec_dist.data.synthetic`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset_writer import ROW_GROUP, write_tables
from ilrec_dist.data.reading.source import Format
from ilrec_dist.data.split import Cuts, find_cuts, split_positions
from ilrec_dist.data.synthetic.generate import (
    GENERATOR_VERSION,
    draw_histories,
    draw_model,
    draw_times,
    item_table,
)


def generate(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Write the generated shop's tables; returns the manifest's counts.

    It is not filtered: an item that nobody took stays in, because the true model knows
    it.
    """
    model = draw_model(config.synthetic)
    items, offsets = draw_histories(model, config.synthetic)
    lengths = np.diff(offsets)
    users = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    columns = {"user": users, "item": items}
    split: dict[str, Any] = {}
    if config.split == "chronological":
        columns["timestamp"] = times = draw_times(offsets, config.synthetic)
        cuts = find_cuts(config, lambda: iter([times]), len(times))
        positions, split["split"] = split_positions(lengths, _before(times, offsets, cuts), cuts)
        np.save(folder / "split_positions.npy", positions)
    pq.write_table(
        pa.table(columns),
        folder / "interactions.parquet",
        compression="zstd",
        row_group_size=ROW_GROUP,
    )
    np.save(folder / "sequences.npy", items)
    user_ids = pa.array([str(user) for user in range(len(lengths))])
    write_tables(folder, user_ids, lengths, item_table(model, config.synthetic))
    model.save(folder / "true_model.npz")
    return {
        **split,
        "users": len(lengths),
        "items": len(model.popularity),
        "interactions": len(items),
        "timestamps": "seconds" if split else None,
        "generator": {"version": GENERATOR_VERSION, **config_to_dict(config.synthetic)},
    }


def _before(times: np.ndarray, offsets: np.ndarray, cuts: Cuts) -> np.ndarray:
    """int64 [2, U]: a user's interactions before each of the two cuts."""
    return np.stack(
        [
            np.add.reduceat((times < cut).astype(np.int64), offsets[:-1])
            for cut in (cuts.validation, cuts.test)
        ]
    )


FORMAT = Format(None, lambda config: [], generate=generate, settings=frozenset({"synthetic"}))
