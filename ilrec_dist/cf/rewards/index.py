"""What the rewards stage makes of trained models for one catalogue (METHOD.md §5).

Item vectors in code order, and the scorers of a large catalogue.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.ann import build_ann_index, save_ann_index
from ilrec_dist.cf.rewards.item_scorer import write_scorer
from ilrec_dist.cf.sasrec.checkpoint import (
    item_vectors,
    load_cf,
    read_manifest,
    write_cf_manifest,
)
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, sha256_file
from ilrec_dist.common.manifest import MANIFEST
from ilrec_dist.common.run_layout import CODE_ORDER
from ilrec_dist.items.catalogue import Catalogue, catalogue_hash
from ilrec_dist.items.trie import Trie

# Up to so many items the rewards scan the whole catalogue for every target.
SCAN_ITEMS = 65_536
# The vectors of the model of all users, and the FAISS index over them, whose ids are positions
# in the same order.
VECTORS, INDEX = "item_embeddings.code-order.npy", "item_embeddings.code-order.faiss"
ORDER = (
    "code order: position p of every array and id p of every index is the item whose index is "
    "items.npy[p] in the folder items of the run; in the order of item indices the vectors are "
    "the tensor items.weight of full.safetensors"
)


def index_kind(config: CFConfig, num_items: int) -> str:
    """The kind of index that `reward_index: auto` means for a catalogue of that size.

    Raises UserError when it cannot be sharded.
    """
    kind: str = config.reward_index
    if kind == "auto":
        kind = "scan" if num_items <= SCAN_ITEMS else "ivf_pq"
    if kind == "scan" and config.reward_shards > 1:
        raise UserError(
            f"cf.reward_shards {config.reward_shards}: a catalogue of {num_items} items is "
            "scanned whole; set it to 1, or choose a cf.reward_index"
        )
    return kind


def write_code_order(config: CFConfig, cf_folder: str | Path, catalogue: Catalogue) -> None:
    """Write the folder `code-order` into the CF folder, whole or not at all.

    Where the catalogue is scanned (`index_kind`) it holds the vectors of the model of
    all users and a flat FAISS index over them, else the scorer of each fold; in either
    case a manifest that ties them to catalogue and models and names their order. Apart
    from the training, so that codes may be built from the models' vectors, and other
    codes or another index train nothing again.
    """
    kind, folder = index_kind(config, catalogue.num_items), Path(cf_folder)
    with committed_folder(folder / CODE_ORDER) as work:
        if kind == "scan":
            vectors = np.ascontiguousarray(item_vectors(folder)[catalogue.items])
            np.save(work / VECTORS, vectors)
            save_ann_index(build_ann_index("flat", vectors), work / INDEX)
        else:
            trie = Trie(catalogue)
            for fold in range(read_manifest(folder)["config"]["cf_folds"]):
                model = load_cf(folder, f"fold{fold}")
                write_scorer(
                    work / f"fold{fold}",
                    model.items.weight,
                    model.known,
                    trie,
                    kind,
                    config.reward_shards,
                )
        entries = {
            "order": ORDER,
            "catalogue": catalogue_hash(catalogue),
            "models": sha256_file(folder / MANIFEST),
            "index": kind,
            "shards": config.reward_shards,
        }
        write_cf_manifest(work, entries)
