"""Items that share one code tuple: counted, refused, or told apart by other codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ilrec_dist.items.residual_quantizer import CHUNK_ROWS, Codebooks


@dataclass(frozen=True)
class Resolution:
    """Codes without collisions and how they came about: "none", "last level" or "extra
    level".
    """

    codes: np.ndarray  # int32 [n, C or C + 1]
    level_sizes: list[int]
    how: str
    # Items whose last code is another one; 0 for an extra level, which lengthens all tuples.
    items_changed: int


def tuple_groups(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group int32 [n] of each row's code tuple, size int64 [groups]), groups in code
    order.
    """
    if codes.shape[1] == 0:
        return np.zeros(len(codes), np.int32), np.array([len(codes)])
    order = np.lexsort(codes.T[::-1])
    first = np.zeros(len(codes), bool)
    first[:1] = True
    # One level at a time: a large catalogue's codes would be in memory three times.
    for level in codes.T:
        sorted_codes = level[order]
        first[1:] |= sorted_codes[1:] != sorted_codes[:-1]
    group = np.empty(len(codes), np.int32)
    group[order] = np.cumsum(first, dtype=np.int32) - 1
    del order
    return group, np.bincount(group)


def collision_report(codes: np.ndarray) -> dict[str, int | float]:
    """Items that share their tuple, shared tuples, items beyond one a tuple, the
    largest group.
    """
    _, sizes = tuple_groups(codes)
    shared = sizes[sizes > 1]
    return {
        "items": int(shared.sum()),
        "share": float(shared.sum() / max(len(codes), 1)),
        "tuples": len(shared),
        "excess_items": int((shared - 1).sum()),
        "largest_group": int(sizes.max()) if len(sizes) else 0,
    }


def resolution_preview(codes: np.ndarray, level_sizes: list[int]) -> dict[str, Any]:
    """What `resolve_collisions` would do, without the assignment: {"how", "items" or
    "codes"}.

    "last level": at least `items` items get another last code. "extra level": of
    `codes` codes.
    """
    _, sizes = tuple_groups(codes)
    if (sizes <= 1).all():
        return {"how": "none"}
    _, prefix_sizes = tuple_groups(codes[:, :-1])
    if prefix_sizes.max() > level_sizes[-1]:
        return {"how": "extra level", "codes": int(sizes.max())}
    return {"how": "last level", "items": int((sizes - 1).sum())}


def first_collision(codes: np.ndarray) -> tuple[int, int] | None:
    """Two items, lowest indices first, that share a tuple."""
    group, sizes = tuple_groups(codes)
    shared = np.flatnonzero(sizes[group] > 1)
    if len(shared) == 0:
        return None
    item = int(shared[0])
    return item, int(np.flatnonzero(group == group[item])[1])


def resolve_collisions(
    codes: np.ndarray, level_sizes: list[int], vectors: np.ndarray | None, books: Codebooks | None
) -> Resolution:
    """Give every item a tuple that no other item has.

    Where no prefix of all but the last level holds more items than the last level has
    codes: within each prefix that has collisions, the items that collide are assigned
    to the codes that no other item of the prefix holds, at the least total increase in
    squared distance to the codes' centroids. Codes without a centroid cost as much as
    the farthest known one; without vectors every move costs the same. Items that
    collide with none keep their codes, and so does mostly one of those that share a
    tuple; now and then the total is smaller when an item of another tuple takes that
    code. Otherwise a level is added that numbers the items of each tuple in index
    order.
    """
    group, sizes = tuple_groups(codes)
    if (sizes <= 1).all():
        return Resolution(codes, level_sizes, "none", 0)
    last = codes.shape[1] - 1
    prefix, prefix_sizes = tuple_groups(codes[:, :last])
    if prefix_sizes.max() > level_sizes[last]:
        order = np.argsort(group, kind="stable")
        rank = np.empty(len(codes), np.int32)
        rank[order] = np.arange(len(codes)) - (np.cumsum(sizes) - sizes)[group[order]]
        longer = np.column_stack([codes, rank]).astype(np.int32)
        return Resolution(longer, [*level_sizes, int(sizes.max())], "extra level", 0)
    result = codes.copy()
    collides = sizes[group] > 1
    del group
    has_collisions = np.zeros(len(prefix_sizes), bool)
    has_collisions[prefix[collides]] = True
    order = np.argsort(prefix, kind="stable").astype(np.int32)
    crowded = order[has_collisions[prefix[order]]]
    del order
    colliding = np.flatnonzero(collides)
    residuals = None
    if vectors is not None and books is not None:
        residuals = np.empty((len(colliding), vectors.shape[1]), np.float32)
        for start in range(0, len(colliding), CHUNK_ROWS):
            rows = colliding[start : start + CHUNK_ROWS]
            residuals[start : start + CHUNK_ROWS] = books.residual(vectors[rows], codes[rows], last)
    for members in np.split(crowded, np.flatnonzero(np.diff(prefix[crowded])) + 1):
        moving = members[collides[members]]
        free = np.setdiff1d(np.arange(level_sizes[last]), codes[members[~collides[members]], last])
        cost = np.ones((len(moving), len(free)))
        if residuals is not None and books is not None:
            cost = _move_cost(
                residuals[np.searchsorted(colliding, moving)],
                books.levels[last],
                codes[moving, last],
                free,
            )
        cost[free[None, :] == codes[moving, last][:, None]] = 0.0
        rows, columns = linear_sum_assignment(cost)
        result[moving[rows], last] = free[columns]
    changed = int((result != codes).any(axis=1).sum())
    return Resolution(result, level_sizes, "last level", changed)


def _move_cost(
    residuals: np.ndarray, book: np.ndarray, current: np.ndarray, free: np.ndarray
) -> np.ndarray:
    """float64 [items, free codes]: the increase in squared distance over the item's
    current code.

    It is at least a trifle, so that staying is preferred.
    """
    distance = known_distances(residuals, book)
    increase = distance[:, free] - distance[np.arange(len(residuals)), current][:, None]
    return np.asarray(np.maximum(increase, 0.0) + 1e-6 * (1.0 + np.abs(distance).mean()))


def known_distances(vectors: np.ndarray, book: np.ndarray) -> np.ndarray:
    """float64 [n, codes] squared distances; a code without a centroid is as far as the
    farthest.
    """
    distance = squared_distances(vectors, book)
    unknown = np.isnan(distance)
    if unknown.all():
        return np.zeros_like(distance)
    return np.where(unknown, np.nanmax(distance, axis=1, keepdims=True), distance)


def squared_distances(vectors: np.ndarray, book: np.ndarray) -> np.ndarray:
    """float64 [n, codes] squared distances of vectors [n, d] to centroids [codes, d].

    NaN for a code without a centroid.
    """
    vectors, book = vectors.astype(np.float64), book.astype(np.float64)
    distance: np.ndarray = (vectors**2).sum(1)[:, None] + (book**2).sum(1) - 2.0 * vectors @ book.T
    return distance
