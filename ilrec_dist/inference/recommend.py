"""Recommendations for new histories with a trained backbone: what `ilrec recommend` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_columns, require_file
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.distributed.process_groups import ParallelState
from ilrec_dist.evaluation.config import EvaluationConfig
from ilrec_dist.inference.beam_search import SoftmaxScope, TrieConstraint
from ilrec_dist.inference.ranker import Histories, Progress, rank_histories
from ilrec_dist.items.trie import Trie
from ilrec_dist.model.gpt import Backbone

COLUMNS = {"user": "the history's owner, a string", "items": "a list of item ids, oldest first"}
SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("rank", pa.int32()),
        ("item", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)


def recommend(
    backbone: Backbone,
    dataset: InteractionDataset,
    trie: Trie,
    *,
    histories: str | Path,
    top: int,
    config: EvaluationConfig,
    softmax_scope: SoftmaxScope,
    max_history: int,
    parallel: ParallelState,
    exclude_seen: bool = False,
    allowed: str | Path | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """The `top` items after each history: a table with the columns user, rank (from 1), item, title and score (Σ log p), in the file's order.

    `histories` is a Parquet file with the columns user and items; the items are those of the training data, by their ids. With exclude_seen
    no item of the user's own history is returned; `allowed` is a text file with one item id a line, and nothing else is returned then. A user
    gets fewer rows where fewer items are left. Collective over `parallel`; the same table on every rank. Raises UserError for bad input.
    """
    if top < 1:
        raise UserError(f"--top {top}: expected at least 1")
    index = {item: number for number, item in enumerate(dataset.item_ids)}
    users, ranges = read_histories(histories, index)
    space = TrieConstraint(
        trie, parallel.device, None if allowed is None else read_allowed(allowed, index)
    )
    found = rank_histories(
        backbone,
        space,
        ranges,
        beam=max(config.beam, top),
        batch_size=config.batch_size,
        softmax_scope=softmax_scope,
        max_history=max_history,
        exclude_seen=exclude_seen,
        parallel=parallel,
        progress=progress,
    )
    items, scores = (
        np.full((len(users), top), -1, np.int64),
        np.full((len(users), top), -np.inf, np.float32),
    )
    for rows, ranked in found:
        width = min(top, ranked.items.shape[1])
        items[rows, :width], scores[rows, :width] = (
            ranked.items[:, :width],
            ranked.scores[:, :width],
        )
    row, column = np.nonzero(items >= 0)
    chosen = items[row, column].tolist()
    titles = dataset.titles
    columns = [
        pa.array([users[number] for number in row], pa.string()),
        pa.array(column + 1, pa.int32()),
        pa.array([dataset.item_ids[item] for item in chosen], pa.string()),
        pa.array([None if titles is None else titles[item] for item in chosen], pa.string()),
        pa.array(scores[row, column], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def read_histories(path: str | Path, index: dict[str, int]) -> tuple[list[str], Histories]:
    """Users and histories of a Parquet file; `index` gives the number of every known item id. Raises UserError that names the row (from 1)."""
    path = require_file(path, "--histories")
    try:
        file = pq.ParquetFile(path)
        require_columns(path, COLUMNS, file.schema_arrow.names)
        table = file.read(columns=list(COLUMNS))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})"
        ) from None
    if table.num_rows == 0:
        raise UserError(f"{path}: no rows; expected one history a row")
    user_type, item_type = (table.schema.field(name).type for name in COLUMNS)
    if not (pa.types.is_list(item_type) or pa.types.is_large_list(item_type)):
        raise UserError(f"{path}: column 'items' is {item_type}, expected {COLUMNS['items']}")
    try:
        users = table.column("user").cast(pa.string()).to_pylist()
        lists = table.column("items").cast(pa.large_list(pa.string())).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"{path}: columns 'user' and 'items' are {user_type} and {item_type}, expected a string and a list of strings"
        ) from None
    lengths = (
        pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    if (lengths == 0).any():
        row = int(np.argmin(lengths))
        raise UserError(
            f"{path}: row {row + 1} (user {users[row]!r}) has an empty history; expected at least one item, leave the row out"
        )
    stop = np.cumsum(lengths)
    items = np.fromiter(
        (index.get(item, -1) for item in lists.flatten().to_pylist()), np.int64, count=int(stop[-1])
    )
    if (items < 0).any():
        place = int(np.argmax(items < 0))
        row = int(np.searchsorted(stop, place, side="right"))
        raise UserError(
            f"{path}: row {row + 1} (user {users[row]!r}) has the item {lists.flatten()[place].as_py()!r}, which is not among the {len(index)} items "
            "that the run was trained on; leave it out"
        )
    return [user or "" for user in users], Histories(items, stop - lengths, stop)


def read_allowed(path: str | Path, index: dict[str, int]) -> np.ndarray:
    """bool [num_items]: the items that a text file names, one id a line (empty lines count for nothing). Raises UserError that names the line."""
    path = require_file(path, "--allowed")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}); expected one item id a line"
        ) from None
    allowed = np.zeros(len(index), bool)
    for number, line in enumerate(lines, start=1):
        item = line.strip()
        if item and item not in index:
            raise UserError(
                f"{path}: line {number}: {item!r} is not among the {len(index)} items that the run was trained on; leave it out"
            )
        if item:
            allowed[index[item]] = True
    if not allowed.any():
        raise UserError(f"{path}: names no item; expected one item id a line")
    return allowed
