"""What the rewards stage makes of trained models for one catalogue: item vectors in code order, and a large catalogue's stores (METHOD.md §5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.ann import build_index, save_index
from ilrec_dist.cf.rewards.item_scorer import write_store
from ilrec_dist.cf.sasrec.checkpoint import (
    item_vectors,
    load_cf,
    read_manifest,
    write_manifest,
)
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, sha256_file
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.items.catalogue import Catalogue, catalogue_hash
from ilrec_dist.items.trie import Trie

SCAN_ITEMS = 65_536  # up to so many items rewards scan the whole catalogue for every target


def index_kind(config: CFConfig, num_items: int) -> str:
    """What `reward_index: auto` comes to for a catalogue of that size. Raises UserError when it cannot be sharded."""
    kind = config.reward_index
    if kind == "auto":
        kind = "scan" if num_items <= SCAN_ITEMS else "ivf_pq"
    if kind == "scan" and config.reward_shards > 1:
        raise UserError(
            f"cf.reward_shards {config.reward_shards}: a catalogue of {num_items} items is scanned whole; set it to 1, or choose a cf.reward_index"
        )
    return kind


def write_code_order(config: CFConfig, cf_folder: str | Path, catalogue: Catalogue) -> None:
    """Write the folder `code-order` into that of the trained models, whole or not at all: where the catalogue is scanned (`index_kind`) item_embeddings.npy
    and items.faiss of the model of all users, else a store per fold with its FAISS indexes; and the manifest that ties them to catalogue and models.

    Apart from the training, so that codes may be built from the models' own vectors, and other codes or another index train nothing again.
    """
    kind, folder = index_kind(config, catalogue.num_items), Path(cf_folder)
    with committed_folder(folder / CODE_ORDER) as work:
        if kind == "scan":
            vectors = np.ascontiguousarray(item_vectors(folder)[catalogue.items])
            np.save(work / "item_embeddings.npy", vectors)
            save_index(build_index("flat", vectors), work / "items.faiss")
        else:
            trie = Trie(catalogue)
            for fold in range(read_manifest(folder)["config"]["cf_folds"]):
                model = load_cf(folder, f"fold{fold}")
                write_store(
                    work / f"fold{fold}",
                    model.items.weight,
                    model.known,
                    trie,
                    kind,
                    config.reward_shards,
                )
        models = sha256_file(folder / "manifest.json")
        write_manifest(
            work,
            {
                "catalogue": catalogue_hash(catalogue),
                "models": models,
                "index": kind,
                "shards": config.reward_shards,
            },
        )
