"""A tiny data set with its CF models, and what the CF tests do with them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ilrec_dist.cf.config import CFConfig
from ilrec_dist.cf.rewards.token_rewards import TokenRewards
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie

CONFIG = CFConfig(
    hidden_size=16, num_layers=1, num_heads=2, max_history=6, epochs=2, patience=2, batch_size=32
)


@dataclass(frozen=True)
class World:
    """Folders and what they hold."""

    data: Path
    items: Path
    cf: Path
    dataset: InteractionDataset
    catalogue: Catalogue
    trie: Trie
    report: dict

    def rewards(
        self, dataset: InteractionDataset | None = None, cf: Path | None = None
    ) -> TokenRewards:
        return TokenRewards.open(cf or self.cf, dataset or self.dataset, self.catalogue, self.trie)

    def rewards_of_others(self, dataset: InteractionDataset) -> TokenRewards:
        """For histories that the models were not trained on, which `open` refuses."""
        own = self.rewards()
        return TokenRewards(own.models, own.folds, dataset, self.catalogue, self.trie, own.scorers)


def copy_models(cf: Path, out: Path) -> Path:
    """A copy of a CF folder without what was made for a catalogue."""
    return Path(shutil.copytree(cf, out, ignore=shutil.ignore_patterns("code-order")))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def training_targets(
    dataset: InteractionDataset, users: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(users, positions) of all training items but each user's first."""
    pairs = [
        (user, position)
        for user in (range(dataset.num_users) if users is None else users)
        for position in range(1, len(dataset.sequence(user)) - 2)
    ]
    return np.array([user for user, _ in pairs]), np.array([position for _, position in pairs])


def with_sequence(
    dataset: InteractionDataset, user: int, sequence: np.ndarray
) -> InteractionDataset:
    """The same data with another sequence of the same length for one user."""
    items = dataset.items.copy()
    items[dataset.offsets[user] : dataset.offsets[user + 1]] = sequence
    return replace(dataset, items=items)


def documented_metrics() -> set[str]:
    """The names in the table of docs/scaling.md.

    `_p95` stands for the name before it with that end.
    """
    text, names = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(), []
    for row in re.findall(r"^\| (`rewards/.*?) \|", text, re.MULTILINE):
        for name in re.findall(r"`(.*?)`", row):
            names.append(name if "/" in name else names[-1].rpartition("_")[0] + name)
    return set(names)
