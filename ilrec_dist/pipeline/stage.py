"""What one stage of a run declares: what it stands on, what it reads and writes, what
it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilrec_dist.training.spec import TrainingSpec


def training_name(method: str, seed: int) -> str:
    """The name of the stage that trains one method with one seed."""
    return f"train {method} seed {seed}"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    It runs again when its settings, the bytes of its inputs, or
    the stages before it change, and when its output is not whole.
    """

    name: str
    # The `ilrec` command that runs it.
    command: str
    # The stages whose output it reads.
    after: tuple[str, ...]
    # The values of the settings that its outcome depends on.
    settings: dict[str, Any]
    # The folder that it writes.
    output: Path
    # The user's files that it reads; raises UserError when one is missing.
    inputs: Callable[[], list[Path]] = list
    # Does the work in this process and returns a one-line summary, if there is something to say.
    # None: the workers do it, together with the other stages of theirs.
    run: Callable[[], str | None] | None = None
    # What a stage of the workers trains; None for the evaluation.
    training: TrainingSpec | None = None
    # Files and folders of the output that must be whole for the stage to be current. None: all.
    required: tuple[str, ...] | None = None
