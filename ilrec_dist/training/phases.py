"""Stretches of a training that differ in their batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ilrec_dist.samples.collate import BatchMaker


class Phases(Protocol):
    """The phases of a training, each from an optimizer step to another."""

    def begin(self, step: int) -> BatchMaker:
        """What makes the batches of the phase that
        holds the step; collective over all ranks.

        Called with a phase's first step before it is taken, and with the step
        from which an interrupted training goes on. What is made of the weights
        at a phase's first step must be kept, for a later step finds others.
        """
        ...

    def end(self, step: int) -> int:
        """The step behind the last one of the phase that holds `step`."""
        ...


def phase_bounds(count: int, epochs: int, steps_per_epoch: int) -> Sequence[int]:
    """The first steps of `count` phases of whole
    epochs, about equally many, and the end.

    There must be at least as many epochs as phases.
    """
    return [round(number * epochs / count) * steps_per_epoch for number in range(count + 1)]
