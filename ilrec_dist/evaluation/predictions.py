"""A method's predictions for all users; the table can be recomputed from them
(METHOD.md §9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import atomic_file
from ilrec_dist.common.parquet import read_checked, write_checked
from ilrec_dist.evaluation.metrics import UNRANKED, Ranks, mean_metrics, per_user, ranks_of_lists

# What the files' metadata say of `scores`.
LOG_P = "log p"
# The key of a file's metadata that has what its predictions were made with.
MADE_WITH = "made_with"
SCHEMA = pa.schema(
    [
        pa.field("user", pa.int32(), metadata={"is": "row of users.parquet"}),
        pa.field("target", pa.int32(), metadata={"is": "row of items.parquet"}),
        pa.field(
            "items", pa.list_(pa.int32()), metadata={"is": "rows of items.parquet, best first"}
        ),
        pa.field("scores", pa.list_(pa.float32()), metadata={"is": "log p of each of `items`"}),
        pa.field(
            "tie_start",
            pa.int32(),
            metadata={
                "is": "first rank, from 0, of the items that cannot be told apart from the target; "
                "null where the target is not in the ranking"
            },
        ),
        pa.field(
            "tie_size", pa.int32(), metadata={"is": "number of those items, the target included"}
        ),
    ]
)


@dataclass(frozen=True)
class Predictions:
    """Ranked lists for n users, ascending by user.

    `tie_start` is UNRANKED where the target is not in the ranking.
    """

    users: np.ndarray  # int64 [n]
    targets: np.ndarray  # int64 [n]
    items: np.ndarray  # int32 [n, W] best first, padded with -1
    scores: np.ndarray  # float32 [n, W], log p, padded with -inf
    tie_start: np.ndarray  # int64 [n]
    tie_size: np.ndarray  # int64 [n]
    exclude_seen: bool
    # False of files in which baselines and fusions have the scores that they rank by.
    scores_are_log_p: bool = True

    @cached_property
    def ranks(self) -> Ranks:
        rank = ranks_of_lists(self.items, self.targets)
        return Ranks(rank, self.tie_start, self.tie_size)

    def metrics(self) -> dict[str, float]:
        """Means over users: hit@k, ndcg@k, their standard errors `…_se`, and
        `expected_…`.
        """
        return mean_metrics(self.ranks)

    @property
    def num_users_without_items(self) -> int:
        """Users with an empty list, which counts as a miss: their history holds every
        item.
        """
        return int((self.items < 0).all(axis=1).sum())

    def per_user(self) -> dict[str, np.ndarray]:
        """float64 [n] of the same metrics, for paired comparisons."""
        return per_user(self.ranks)

    def row(self, method: str, seed: int | None = None) -> dict[str, Any]:
        """A row of results.json."""
        return (
            {"method": method}
            | self.metrics()
            | {
                "users": len(self.users),
                "users_without_items": self.num_users_without_items,
                "seed": seed,
                "exclude_seen": self.exclude_seen,
            }
        )

    def save(self, path: str | Path, made_with: str) -> None:
        """Write the Parquet file whole or not at all, with what the predictions
        were made with in its metadata.
        """
        is_item = self.items >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(is_item.sum(axis=1))]), pa.int32())
        unranked = self.tie_start >= UNRANKED
        columns = [
            pa.array(self.users, pa.int32()),
            pa.array(self.targets, pa.int32()),
            pa.ListArray.from_arrays(offsets, pa.array(self.items[is_item], pa.int32())),
            pa.ListArray.from_arrays(offsets, pa.array(self.scores[is_item], pa.float32())),
            pa.array(np.where(unranked, 0, self.tie_start), pa.int32(), mask=unranked),
            pa.array(self.tie_size, pa.int32()),
        ]
        metadata = {
            "exclude_seen": str(self.exclude_seen).lower(),
            "scores": LOG_P,
            MADE_WITH: made_with,
        }
        schema = SCHEMA.with_metadata(metadata)
        with atomic_file(path) as staged:
            write_checked(pa.Table.from_arrays(columns, schema=schema), staged)

    @staticmethod
    def load(path: str | Path) -> Predictions:
        """Read what `save` wrote. Raises UserError for a missing or foreign file."""
        table = read_checked(path, "predictions", "run `ilrec evaluate` again")
        metadata = table.schema.metadata or {}
        if not table.schema.equals(SCHEMA) or b"exclude_seen" not in metadata:
            raise UserError(
                f"{path}: expected the columns {', '.join(SCHEMA.names)} of predictions; "
                "run `ilrec evaluate` again"
            )
        lists = table.column("items").combine_chunks()
        lengths = np.diff(lists.offsets.to_numpy())
        is_item = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
        items, scores = (
            np.full(is_item.shape, -1, np.int32),
            np.full(is_item.shape, -np.inf, np.float32),
        )
        items[is_item] = lists.flatten().to_numpy()
        scores[is_item] = table.column("scores").combine_chunks().flatten().to_numpy()
        return Predictions(
            users=table.column("user").to_numpy().astype(np.int64),
            targets=table.column("target").to_numpy().astype(np.int64),
            items=items,
            scores=scores,
            tie_start=table.column("tie_start").cast(pa.int64()).fill_null(UNRANKED).to_numpy(),
            tie_size=table.column("tie_size").to_numpy().astype(np.int64),
            exclude_seen=metadata[b"exclude_seen"] == b"true",
            scores_are_log_p=_has_log_p(table.schema),
        )


def _has_log_p(schema: pa.Schema) -> bool:
    return (schema.metadata or {}).get(b"scores") == LOG_P.encode()


def recompute(path: str | Path) -> dict[str, float]:
    """The metrics of a predictions.parquet, from the file alone."""
    return Predictions.load(path).metrics()


def read_made_with(path: str | Path) -> str | None:
    """What a file of predictions says that it was made with; None for other files."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    text: bytes | None = metadata.get(MADE_WITH.encode())
    return None if text is None else text.decode(errors="replace")


def join_predictions(parts: Sequence[Path], out: Path) -> None:
    """Write what `Predictions.save` wrote for disjoint users, ascending from part to
    part, as one file, whole or not at all; one part is in memory at a time. Raises
    ValueError for no users.
    """
    if not parts:
        raise ValueError("predictions of no users")
    with atomic_file(out) as staged:
        schema = pq.read_schema(parts[0])
        with pq.ParquetWriter(staged, schema, write_page_checksum=True) as writer:
            for part in parts:
                writer.write_table(
                    read_checked(part, "a part of predictions", "run `ilrec evaluate` again")
                )


def concatenate_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of one method for disjoint users as one, ascending by user."""
    width = max(part.items.shape[1] for part in parts)
    order = np.argsort(np.concatenate([part.users for part in parts]), kind="stable")

    def concatenated(name: str, fill: float | None = None) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        if fill is not None:
            arrays = [
                np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)
                for array in arrays
            ]
        return np.concatenate(arrays)[order]

    return Predictions(
        users=concatenated("users"),
        targets=concatenated("targets"),
        items=concatenated("items", -1),
        scores=concatenated("scores", -np.inf),
        tie_start=concatenated("tie_start"),
        tie_size=concatenated("tie_size"),
        exclude_seen=parts[0].exclude_seen,
    )
