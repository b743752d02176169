"""The nearest layout that fits where the configured one does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.config.tree import Config
from ilrec_dist.plan.hardware import Hardware
from ilrec_dist.plan.plan import Plan, plan_again

NODES = (1, 2, 4, 8)
SHORTER = (2, 4, 8, 16, 32, 64)
# A key of the configuration and another value for it.
Change = tuple[str, Any]


@dataclass(frozen=True)
class Proposal:
    # As it is appended to the command.
    words: str
    plan: Plan


def nearest_fitting(plan: Plan) -> Proposal | None:
    """The nearest that fits; None where nothing does.

    That is one on as few nodes as possible, among these one that changes as few keys as
    possible, and among these the one whose predicted step is slowed least, by whole
    percents of the plan's. To be faster than asked is no merit: the first of several
    that are equal is taken, in the order of `_other_values`.
    """
    values = _other_values(plan.config, plan.hardware)
    for times in NODES:
        hardware = replace(plan.hardware, nodes=times * plan.hardware.nodes)
        for count in range(len(values) + 1):
            fitting = [
                Proposal(_words(changes, hardware, times), other)
                for changes in _of_so_many_keys(values, count)
                if (other := _planned(plan, changes, hardware)) is not None and other.fits
            ]
            if fitting:
                return min(fitting, key=lambda choice: _percents_slower(choice.plan, plan))
    return None


def _other_values(config: Config, hardware: Hardware) -> list[list[Change]]:
    """For every key that may change what to try, from what changes least on."""
    train, launch = config.train, config.launch
    steps, budget = train.accumulation_steps, train.micro_batch_tokens
    shorter: list[Change] = [("train.accumulation_steps", times * steps) for times in SHORTER]
    if budget is not None:
        tokens = (budget // times for times in SHORTER)
        shorter = [("train.micro_batch_tokens", count) for count in tokens if count > 0]
    stages = range(train.zero_stage + 1, 4)
    divisors = (
        tp for tp in range(1, hardware.gpus_per_node + 1) if not hardware.gpus_per_node % tp
    )
    return [
        shorter,
        [("train.zero_stage", stage) for stage in stages],
        [] if launch.sequence_parallel else [("launch.sequence_parallel", True)],
        [] if train.recompute else [("train.recompute", True)],
        [("launch.tp", tp) for tp in divisors if tp > launch.tp],
    ]


def _of_so_many_keys(
    values: Sequence[Sequence[Change]], count: int
) -> Iterator[tuple[Change, ...]]:
    for keys in itertools.combinations(values, count):
        yield from itertools.product(*keys)


def _planned(plan: Plan, changes: Sequence[Change], hardware: Hardware) -> Plan | None:
    """None where the configuration would be refused."""
    config = plan.config
    for key, value in changes:
        section, name = key.split(".")
        changed = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section: changed})
    try:
        return plan_again(plan, config, hardware)
    except UserError:
        return None


def _words(changes: Sequence[Change], hardware: Hardware, times: int) -> str:
    nodes = [f"--nodes {hardware.nodes}"] if times > 1 else []
    return " ".join([*nodes, *(f"{key}={str(value).lower()}" for key, value in changes)])


def _percents_slower(other: Plan, plan: Plan) -> int:
    return max(0, round(100 * (other.time.total / plan.time.total - 1)))
