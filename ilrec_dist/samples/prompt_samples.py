"""Which samples a training on prompts has: every
target once, and its share of each other task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.prompts.tasks import NEXT_ITEM, TASKS, Task
from ilrec_dist.prompts.template import Template
from ilrec_dist.prompts.writer import PromptWriter
from ilrec_dist.samples.windows import Windows


@dataclass(frozen=True)
class PromptSample:
    """One sample: its template, what the prompt shows, and the item of the response."""

    template: Template
    # The history, oldest first, or the one item that the template asks about.
    shown: np.ndarray
    item: int
    # The user, and the target's position in the user's sequence; -1 where no history is shown.
    user: int
    position: int


@dataclass(frozen=True)
class _Shown:
    """What the prompts of n samples of one task show."""

    # int64: the items of all prompts, one prompt after the other.
    items: np.ndarray
    # int64 [n]: where each prompt's items begin.
    first: np.ndarray
    # int64 [n] each.
    targets: np.ndarray
    users: np.ndarray
    positions: np.ndarray


class PromptSamples:
    """The samples of an epoch (METHOD.md §10), in the order of the tasks.

    The windows of `targets: last` pose the task next_item once each. Another task has
    as many samples as its share asks for; from epoch to epoch they go through all
    windows, or all items, before they meet one again. A sample's template is drawn by
    (seed, epoch, sample) alone.
    """

    def __init__(
        self,
        dataset: InteractionDataset,
        windows: Windows,
        templates: Sequence[Template],
        shares: Mapping[str, float],
        writer: PromptWriter,
        seed: int,
    ) -> None:
        self.dataset, self.windows, self.writer, self.seed = dataset, windows, writer, seed
        self.tasks = [TASKS[name] for name, share in shares.items() if share > 0]
        self.templates = {
            task.name: [template for template in templates if template.task is task]
            for task in self.tasks
        }
        counts = [_count(len(windows), shares, task.name) for task in self.tasks]
        # The samples of task t of an epoch are numbered from first[t] on.
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def of_epoch(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """int64 [n]: ids that no other sample of any epoch has."""
        return np.asarray(numbers + epoch * len(self))

    def sizes(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: about how many tokens each sample's prompt has."""
        sizes = np.empty(len(sample_ids), np.int64)
        for numbers, task, shown in self._by_task(sample_ids):
            of_items = self.writer.item_sizes(self.templates[task.name][0].history)
            sizes[numbers] = np.add.reduceat(of_items[shown.items], shown.first)
        return sizes

    def targets(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The item of each sample's response, int64
        [n], and whether it is words, bool [n].
        """
        items = np.empty(len(sample_ids), np.int64)
        is_text = np.empty(len(sample_ids), bool)
        for numbers, task, shown in self._by_task(sample_ids):
            items[numbers], is_text[numbers] = shown.targets, task.is_text
        return items, is_text

    def samples(self, sample_ids: np.ndarray) -> list[PromptSample]:
        """The samples with these ids (int64 [n]), in their order."""
        samples: dict[int, PromptSample] = {}
        for numbers, task, shown in self._by_task(sample_ids):
            choices = self.templates[task.name]
            for index, (number, items) in enumerate(
                zip(numbers.tolist(), np.split(shown.items, shown.first[1:]), strict=True)
            ):
                samples[number] = PromptSample(
                    choices[_draw(len(choices), self.seed, int(sample_ids[number]))],
                    items,
                    int(shown.targets[index]),
                    int(shown.users[index]),
                    int(shown.positions[index]),
                )
        return [samples[number] for number in range(len(sample_ids))]

    def _by_task(self, sample_ids: np.ndarray) -> Iterator[tuple[np.ndarray, Task, _Shown]]:
        """For each task: indices into sample_ids,
        int64, and what their prompts show.
        """
        if len(sample_ids) == 0:
            return
        epoch, within = np.divmod(np.asarray(sample_ids, np.int64), len(self))
        tasks = np.searchsorted(self.first, within, side="right") - 1
        for t in np.unique(tasks).tolist():
            numbers, task = np.flatnonzero(tasks == t), self.tasks[t]
            ordinals = within[numbers] - self.first[t]
            if task.name != NEXT_ITEM:
                count = int(self.first[t + 1] - self.first[t])
                total = len(self.windows) if task.has_history else self.dataset.num_items
                ordinals = _spread(epoch[numbers] * count + ordinals, total, self.seed, t)
            yield numbers, task, self._shown(task, ordinals)

    def _shown(self, task: Task, ordinals: np.ndarray) -> _Shown:
        """Of windows, or of items, with these numbers."""
        if not task.has_history:
            nobody = np.full(len(ordinals), -1)
            return _Shown(ordinals, np.arange(len(ordinals)), ordinals, nobody, nobody)
        slices = self.windows.slices(ordinals)
        begin, counts = self.dataset.offsets[slices.user], slices.target - slices.start
        items = self.dataset.items[ragged_ranges(begin + slices.start, counts)]
        targets = self.dataset.items[begin + slices.target]
        return _Shown(
            np.asarray(items, np.int64),
            np.cumsum(counts) - counts,
            np.asarray(targets, np.int64),
            slices.user,
            slices.target,
        )


def epoch_length(num_windows: int, shares: Mapping[str, float]) -> int:
    """The samples of an epoch, of all tasks."""
    return sum(_count(num_windows, shares, name) for name in shares)


def _count(num_windows: int, shares: Mapping[str, float], name: str) -> int:
    return round(num_windows * shares[name] / shares[NEXT_ITEM])


def _spread(ordinals: np.ndarray, total: int, seed: int, task: int) -> np.ndarray:
    """Map 0, 1, 2, … to numbers below `total`, each once before one comes again.

    It is a walk whose stride is coprime with the
    total, which needs no permutation in memory.
    """
    rng = np.random.default_rng([seed, task])
    stride = int(rng.integers(total // 3 + 1, total // 3 * 2 + 2))
    while math.gcd(stride, total) != 1:
        stride += 1
    spread: np.ndarray = (ordinals % total * stride + int(rng.integers(total))) % total
    return spread


def _draw(count: int, seed: int, sample: int) -> int:
    return int(np.random.default_rng([seed, sample]).integers(count)) if count > 1 else 0
