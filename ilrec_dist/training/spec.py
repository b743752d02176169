"""What identifies one training of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingSpec:
    """One method with one seed, the folder it writes to, and its fingerprint.

    The fingerprint is a SHA-256 over the configuration and the inputs that decide the
    weights; a checkpoint with another fingerprint is refused.
    """

    method: str
    seed: int
    folder: Path
    fingerprint: str
    # What the command has said of its damaged checkpoints, which is not said again.
    reported_damage: Sequence[str] = ()

    @property
    def title(self) -> str:
        return f"{self.method}, seed {self.seed}"
