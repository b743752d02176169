"""log π_ref of every target and its negatives
(METHOD.md §11), computed once and kept on disk.

The windows are cut into shards that the data-parallel ranks
share out. Each shard is a file that appears whole or not at all,
so that an interrupted computation goes on behind the last one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ilrec_dist.common.files import atomic_file, write_array
from ilrec_dist.distributed.layout import ParallelState
from ilrec_dist.objective.preference import PreferenceObjective
from ilrec_dist.samples.preference_pairs import PreferenceBatch, PreferenceBatchMaker
from ilrec_dist.training.kept_arrays import kept_array

# Windows whose targets are one file.
SHARD_WINDOWS = 4096
# Further columns of a batch's targets, float32 [T, c].
Columns = Callable[[PreferenceBatch], np.ndarray]


def known_of_targets(
    objective: PreferenceObjective,
    maker: PreferenceBatchMaker,
    folder: Path,
    name: str,
    fingerprint: str,
    batch_size: int,
    parallel: ParallelState,
    more: Columns | None = None,
) -> np.ndarray:
    """float32 [all targets, 1 + n + c]: log π of
    each target and its negatives, then `more`.

    The objective's weights as they are now are the reference. The array is the
    folder's kept array `name`: computed where there is none of this fingerprint.
    Collective over all ranks. Raises UserError where the file is damaged.
    """

    def write(path: Path) -> None:
        shards = folder / f"{name}.shards"
        _compute_shards(objective, maker, shards, fingerprint, batch_size, parallel, more)
        dist.barrier()
        if dist.get_rank() == 0:
            _join(shards, path)

    return kept_array(folder, name, fingerprint, write)


@torch.no_grad()
def _compute_shards(
    objective: PreferenceObjective,
    maker: PreferenceBatchMaker,
    folder: Path,
    fingerprint: str,
    batch_size: int,
    parallel: ParallelState,
    more: Columns | None,
) -> None:
    if dist.get_rank() == 0:
        # Shards of other weights are of no use.
        mark = folder / fingerprint
        if folder.exists() and not mark.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    was_training = objective.training
    objective.eval()
    firsts = range(0, len(maker.windows), SHARD_WINDOWS)
    for number in range(parallel.dp_rank, len(firsts), parallel.dp):
        path = folder / f"{number:08d}.npy"
        # The ranks of a tensor-parallel group look before one of them writes.
        exists = path.exists()
        dist.barrier(group=parallel.tp_group)
        if exists:
            continue
        last = min(firsts[number] + SHARD_WINDOWS, len(maker.windows))
        rows = _rows_of(objective, maker, np.arange(firsts[number], last), batch_size, more)
        if parallel.tp_rank == 0:
            write_array(path, rows)
    objective.train(was_training)


def _rows_of(
    objective: PreferenceObjective,
    maker: PreferenceBatchMaker,
    window_ids: np.ndarray,
    batch_size: int,
    more: Columns | None,
) -> np.ndarray:
    """What is known of the targets of consecutive windows, in the targets' order."""
    # Windows of similar lengths go together.
    order = window_ids[np.argsort(maker.windows.slices(window_ids).lengths, kind="stable")]
    indices, parts = [], []
    for first in range(0, len(order), batch_size):
        batch = maker.make(order[first : first + batch_size], 1)
        scores = objective.scores(*batch.model_inputs(objective.parallel.device))
        columns = [
            scores.target.float().cpu().numpy()[:, None],
            scores.negatives.float().cpu().numpy(),
        ]
        if more is not None:
            columns.append(more(batch))
        parts.append(np.concatenate(columns, axis=1).astype(np.float32))
        indices.append(maker.target_index(batch.users, batch.positions))
    table: np.ndarray = np.concatenate(parts)[np.argsort(np.concatenate(indices))]
    return table


def _join(shards: Path, path: Path) -> None:
    """Write the shards as one file and remove them."""
    arrays = [np.load(file, mmap_mode="r") for file in sorted(shards.glob("*.npy"))]
    shape = sum(map(len, arrays)), arrays[0].shape[1]
    with atomic_file(path) as staged:
        joined = np.lib.format.open_memmap(staged, mode="w+", dtype=np.float32, shape=shape)
        np.concatenate(arrays, out=joined)
        joined.flush()
    shutil.rmtree(shards)
