"""The generated shop, which is not read but written (`ilrec_dist.data.synthetic`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.dataset_writer import ROW_GROUP, write_tables
from ilrec_dist.data.reading.source import Format
from ilrec_dist.data.synthetic.generate import (
    GENERATOR_VERSION,
    draw_histories,
    draw_model,
    item_table,
)


def generate(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Write the generated shop's tables; returns the manifest's counts.

    It is not filtered: an item that nobody took stays in, because the true model knows
    it.
    """
    if config.split != "leave_one_out":
        raise UserError(
            f"data.split {config.split}: the generated data have no times; "
            f"leave it at leave_one_out"
        )
    model = draw_model(config.synthetic)
    items, offsets = draw_histories(model, config.synthetic)
    lengths = np.diff(offsets)
    users = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    pq.write_table(
        pa.table({"user": users, "item": items}),
        folder / "interactions.parquet",
        compression="zstd",
        row_group_size=ROW_GROUP,
    )
    np.save(folder / "sequences.npy", items)
    user_ids = pa.array([str(user) for user in range(len(lengths))])
    write_tables(folder, user_ids, lengths, item_table(model, config.synthetic))
    model.save(folder / "true_model.npz")
    return {
        "users": len(lengths),
        "items": len(model.popularity),
        "interactions": len(items),
        "timestamps": None,
        "generator": {"version": GENERATOR_VERSION, **config_to_dict(config.synthetic)},
    }


FORMAT = Format(None, lambda config: [], generate=generate, settings=frozenset({"synthetic"}))
