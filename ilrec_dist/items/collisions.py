"""Items that share one code tuple: counted, refused, or told apart by reassigning the last code or adding a level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ilrec_dist.items.residual_quantizer import AT_ONCE, Codebooks


@dataclass(frozen=True)
class Resolution:
    """Codes without collisions and how they came about: "none", "last level" or "extra level"."""

    codes: np.ndarray  # int32 [n, C or C + 1]
    level_sizes: list[int]
    how: str
    items_changed: (
        int  # items whose code tuple is another one (last level only; an extra level lengthens all)
    )


def tuple_groups(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group int32 [n] of each row's code tuple, size int64 [groups]); groups are numbered in code order."""
    if codes.shape[1] == 0:
        return np.zeros(len(codes), np.int32), np.array([len(codes)])
    order = np.lexsort(codes.T[::-1])
    first = np.zeros(len(codes), bool)
    first[:1] = True
    for (
        level
    ) in codes.T:  # not all at once: a large catalogue's codes would be in memory three times
        sorted_codes = level[order]
        first[1:] |= sorted_codes[1:] != sorted_codes[:-1]
    group = np.empty(len(codes), np.int32)
    group[order] = np.cumsum(first, dtype=np.int32) - 1
    del order
    return group, np.bincount(group)


def collision_report(codes: np.ndarray) -> dict[str, int | float]:
    """Items that share their tuple, the tuples that are shared, items in excess of one a tuple, and the largest group."""
    _, sizes = tuple_groups(codes)
    shared = sizes[sizes > 1]
    return {
        "items": int(shared.sum()),
        "share": float(shared.sum() / max(len(codes), 1)),
        "tuples": len(shared),
        "excess_items": int((shared - 1).sum()),
        "largest_group": int(sizes.max()) if len(sizes) else 0,
    }


def first_collision(codes: np.ndarray) -> tuple[int, int] | None:
    """Two items, lowest indices first, that share a tuple."""
    group, sizes = tuple_groups(codes)
    shared = np.flatnonzero(sizes[group] > 1)
    if len(shared) == 0:
        return None
    one = int(shared[0])
    return one, int(np.flatnonzero(group == group[one])[1])


def resolve_collisions(
    codes: np.ndarray, level_sizes: list[int], vectors: np.ndarray | None, books: Codebooks | None
) -> Resolution:
    """Give every item a tuple of its own.

    Where no prefix of all but the last level holds more items than the last level has codes: within each prefix that has collisions, the items that
    collide are assigned to the codes that no other item of the prefix holds, at the least total increase in squared distance to the codes' centroids
    (codes without a centroid cost as much as the farthest known one; without vectors every move costs the same). Items that collide with none keep their
    codes, and so does mostly one of those that share a tuple; now and then the total is smaller when an item of another tuple takes that code. Otherwise a
    level is added that numbers the items of each tuple in index order.
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
        return Resolution(
            np.column_stack([codes, rank]).astype(np.int32),
            [*level_sizes, int(sizes.max())],
            "extra level",
            0,
        )
    result = codes.copy()
    collides = sizes[group] > 1
    del group
    has_collisions = np.zeros(len(prefix_sizes), bool)
    has_collisions[prefix[collides]] = True
    order = np.argsort(prefix, kind="stable").astype(np.int32)
    crowded = order[has_collisions[prefix[order]]]
    del order
    colliding = np.flatnonzero(collides)
    rest = None
    if vectors is not None and books is not None:
        rest = np.empty((len(colliding), vectors.shape[1]), np.float32)
        for start in range(0, len(colliding), AT_ONCE):
            some = colliding[start : start + AT_ONCE]
            rest[start : start + AT_ONCE] = books.residual(vectors[some], codes[some], last)
    for members in np.split(crowded, np.flatnonzero(np.diff(prefix[crowded])) + 1):
        moving = members[collides[members]]
        free = np.setdiff1d(np.arange(level_sizes[last]), codes[members[~collides[members]], last])
        cost = np.ones((len(moving), len(free)))
        if rest is not None and books is not None:
            cost = _cost(
                rest[np.searchsorted(colliding, moving)],
                books.levels[last],
                codes[moving, last],
                free,
            )
        cost[free[None, :] == codes[moving, last][:, None]] = 0.0
        rows, columns = linear_sum_assignment(cost)
        result[moving[rows], last] = free[columns]
    return Resolution(result, level_sizes, "last level", int((result != codes).any(axis=1).sum()))


def _cost(rest: np.ndarray, book: np.ndarray, own: np.ndarray, free: np.ndarray) -> np.ndarray:
    """float64 [items, free codes]: increase in squared distance over the item's own code, at least a trifle so that staying is preferred."""
    distance = squared_distances(rest, book)
    distance = np.where(np.isnan(distance), np.nanmax(distance, axis=1, keepdims=True), distance)
    increase = distance[:, free] - distance[np.arange(len(rest)), own][:, None]
    return np.maximum(increase, 0.0) + 1e-6 * (1.0 + np.abs(distance).mean())


def squared_distances(vectors: np.ndarray, book: np.ndarray) -> np.ndarray:
    """float64 [n, codes] squared distances of vectors [n, d] to centroids [codes, d]; NaN for a code without a centroid."""
    vectors, book = vectors.astype(np.float64), book.astype(np.float64)
    return (vectors**2).sum(1)[:, None] + (book**2).sum(1) - 2.0 * vectors @ book.T
