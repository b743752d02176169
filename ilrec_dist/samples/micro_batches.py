"""How the samples of an optimizer step are dealt out to
ranks and micro-batches (METHOD.md §6).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PlannedBatch(NamedTuple):
    """One micro-batch of a rank, before it is made."""

    # int64 [B].
    sample_ids: np.ndarray
    # N of the whole optimizer step.
    step_rows: int
    # This rank's micro-batches of the step.
    in_step: int


def micro_batches(
    sample_ids: np.ndarray, dp_rank: int, dp: int, accumulation: int
) -> list[np.ndarray]:
    """The samples of each of this rank's micro-batches of a step.

    They are dealt round-robin, so that sequence lengths are even over ranks.
    """
    stride = dp * accumulation
    return [sample_ids[(dp_rank * accumulation + i) :: stride] for i in range(accumulation)]


def within_budget(tokens: np.ndarray, budget: int, packs: bool) -> list[np.ndarray]:
    """Divide samples of `tokens` int [n] into micro-batches of at most `budget` tokens.

    Each is an ascending array of indices, and there is one even without samples. A
    sample above the budget is alone. Unless it `packs`, a micro-batch takes as many
    tokens as its samples would if all were as long as the longest one.
    """
    longest_first = np.argsort(-tokens, kind="stable")
    alone, rest = np.split(longest_first, [int((tokens > budget).sum())])
    groups = [[number] for number in alone.tolist()]
    if packs:
        groups += _even_groups(rest.tolist(), tokens, budget)
    else:
        while len(rest):
            count = budget // int(tokens[rest[0]])
            groups.append(rest[:count].tolist())
            rest = rest[count:]
    return [np.array(sorted(group), np.int64) for group in groups or [[]]]


def _even_groups(longest_first: list[int], tokens: np.ndarray, budget: int) -> list[list[int]]:
    """The fewest groups, each sample in the one that is least filled before it."""
    if not longest_first:
        return []
    count = -(-int(tokens[longest_first].sum()) // budget)
    while True:
        groups: list[list[int]] = [[] for _ in range(count)]
        filled = np.zeros(count, np.int64)
        for number in longest_first:
            least = int(filled.argmin())
            groups[least].append(number)
            filled[least] += tokens[number]
        if filled.max() <= budget:
            return groups
        count += 1
