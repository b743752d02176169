"""Where each stage of a run writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# In a training's folder when it is finished.
RESULT = "result.json"
# Its key that maps the folders of weights to the SHA-256 of their manifests.
WEIGHTS_SHA256 = "weights_sha256"
# The key, in its entry "model", of the SHA-256 of the weights that a partial training stands on.
BASE_SHA256 = "base_sha256"
# In a training's folder: what it took.
USAGE = "usage.json"
# How far the workers are: in the evaluation's folder, and in that of CF training.
COUNTER = ".progress.json"
# The weights of the best validation and those after the last step: folders in a training's folder.
BEST, FINAL = "best", "final"
# Within the CF folder: what is made of the models for one catalogue.
CODE_ORDER = "code-order"
# Within a run's folder: what `ilrec analyze` found.
ANALYSIS = "analysis.json"
# Within a run's folder: the records of its stages, and what a command under way has replaced.
STAGES, PREVIOUS = ".stages", ".previous"
# The configuration of the last command that began a stage; among the records, its SHA-256.
CONFIG, CONFIG_SHA256 = "config.yaml", "config.sha256"

# Within the folder of runs: dequantised models, which all its runs share.
MODELS = ".models"


@dataclass(frozen=True)
class RunFolders:
    root: Path

    @property
    def stages(self) -> Path:
        return self.root / STAGES

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def items(self) -> Path:
        return self.root / "items"

    @property
    def cf(self) -> Path:
        return self.root / "cf"

    @property
    def cf_work(self) -> Path:
        """Of the workers, while they train CF models together."""
        return self.root / ".cf-work"

    @property
    def rewards(self) -> Path:
        return self.cf / CODE_ORDER

    def baseline(self, name: str) -> Path:
        return self.root / "baselines" / name

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def trainings(self) -> Path:
        return self.root / "train"

    def training(self, method: str, seed: int) -> Path:
        return self.trainings / f"{method}-seed{seed}"
