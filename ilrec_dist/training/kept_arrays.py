"""Arrays that a training computes once and keeps in its folder, with their SHA-256."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ilrec_dist.common.files import map_array, read_json_object, sha256_file, write_json
from ilrec_dist.common.manifest import check_hashes
from ilrec_dist.distributed.layout import from_rank0, is_rank0


def kept_array(
    folder: Path, name: str, fingerprint: str, write: Callable[[Path], None]
) -> np.ndarray:
    """The array `name`.npy of the folder, mapped;
    `write(path)` makes it where there is none.

    `name`.json has its SHA-256 and the fingerprint of what it was made of; one of
    another fingerprint is made anew. `write` is called on every rank, and the file
    appears whole, from rank 0. Collective over all ranks. Raises UserError where the
    file is damaged.
    """
    path, note = folder / f"{name}.npy", folder / f"{name}.json"
    if not is_kept(folder, name, fingerprint):
        write(path)
        if dist.get_rank() == 0:
            write_json(note, {"fingerprint": fingerprint, "sha256": sha256_file(path)})
        dist.barrier()
    repair = f"delete {folder} and run `ilrec run` again"
    check_hashes(folder, {path.name: read_json_object(note).get("sha256")}, note.name, repair)
    return map_array(path)


def is_kept(folder: Path, name: str, fingerprint: str) -> bool:
    """Whether the finished array is there; rank 0 looks, so that all ranks agree."""
    note = folder / f"{name}.json"
    answer: bool = from_rank0(
        is_rank0() and note.exists() and read_json_object(note).get("fingerprint") == fingerprint
    )
    return answer
