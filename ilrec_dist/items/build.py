"""`ilrec index`: a given index.json, or codes built by residual quantisation → the catalogue folder and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.config import ItemsConfig
from ilrec_dist.data.files import committed_folder, require_file, write_json
from ilrec_dist.data.prepared import Prepared
from ilrec_dist.errors import UserError
from ilrec_dist.items.catalogue import make_catalogue
from ilrec_dist.items.index_file import read_index, write_index


def input_files(config: ItemsConfig) -> list[Path]:
    """Files whose bytes decide whether the stage must run again."""
    return [require_file(config.index, "items.index")] if config.index else []


def build_index(config: ItemsConfig, prepared: Prepared, out: str | Path, cf_embeddings: np.ndarray | None = None) -> dict[str, Any]:
    codes, sizes, names = read_index(require_file(config.index, "items.index"), prepared.item_ids)
    catalogue = make_catalogue(codes, sizes, names)
    with committed_folder(out) as folder:
        catalogue.save(folder)
        write_json(folder / "report.json", {})
    return {}
