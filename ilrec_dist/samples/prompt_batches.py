"""Makes batches of prompts: written, tokenized, with their response rows marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from ilrec_dist.common.ragged import ragged_ranges
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie
from ilrec_dist.prompts.tasks import Task
from ilrec_dist.prompts.writer import PromptRequest, PromptWriter
from ilrec_dist.samples.collate import Batch, ItemRows, RowGroups
from ilrec_dist.samples.prompt_samples import PromptSample, PromptSamples


@dataclass(frozen=True)
class WrittenSample:
    """A sample as tokens."""

    sample: PromptSample
    prompt: list[int]
    response: list[int]

    @property
    def inputs(self) -> list[int]:
        """A sequence's last token is never an input."""
        return [*self.prompt, *self.response[:-1]]


class PromptBatchMaker:
    """Builds batches from prompt samples, as `BatchMaker` does from windows."""

    def __init__(
        self, catalogue: Catalogue, trie: Trie, samples: PromptSamples, writer: PromptWriter
    ) -> None:
        self.catalogue, self.trie, self.samples, self.writer = catalogue, trie, samples, writer
        # What `num_tokens` has last written, by sample.
        self._written: dict[int, WrittenSample] = {}
        # Tokens of each item's title as a response in words; 0 where they are not yet counted.
        self._text_lengths = np.zeros(catalogue.num_items, np.int32)

    def make(self, sample_ids: np.ndarray, step_rows: int) -> Batch:
        """The micro-batch of these samples (int64 [B]).

        No samples give one sequence of padding
        without rows: every rank takes part in a step.
        """
        written = sorted(self._write(sample_ids), key=lambda prompt: _group(prompt.sample))
        samples = [prompt.sample for prompt in written]
        responses = [prompt.response for prompt in written]
        sequences = [prompt.inputs for prompt in written]
        width = max(map(len, sequences), default=1)
        padding = self.catalogue.vocabulary.padding
        tokens = np.full((max(len(samples), 1), width), padding, np.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence
        lengths = np.array([len(response) for response in responses], np.int64)
        first_row = np.arange(len(samples)) * width - 1
        first_row += np.array([len(prompt.prompt) for prompt in written], np.int64)

        groups = np.array([_group(sample) for sample in samples], np.int64)
        items = np.array([sample.item for sample in samples], np.int64)[groups < 2]
        rewarded = groups == 0
        rows = ItemRows.of(self.catalogue, self.trie, items)
        history, item, text = (int(lengths[groups == group].sum()) for group in range(3))
        return Batch(
            tokens=torch.from_numpy(tokens),
            rows=torch.from_numpy(ragged_ranges(first_row, lengths)),
            targets=torch.tensor(list(chain.from_iterable(responses)), dtype=torch.int64),
            candidate_indptr=rows.indptr,
            candidate_tokens=rows.tokens,
            reward_mask=rows.reward_mask_of(int(rewarded.sum())),
            grid_index=rows.grid_index,
            users=np.array([sample.user for sample in samples], np.int64)[rewarded],
            positions=np.array([sample.position for sample in samples], np.int64)[rewarded],
            step_rows=step_rows,
            num_tokens=sum(map(len, sequences)),
            groups=RowGroups(history, item, text, int(rows.indptr[history]))
            if item or text
            else None,
        )

    @property
    def packs(self) -> bool:
        return True

    def num_tokens(self, sample_ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the input tokens of each sample.

        They are known when the prompts are written, and these are kept for `make`.
        """
        self._written.clear()
        written = self._write(sample_ids)
        self._written = dict(zip(sample_ids.tolist(), written, strict=True))
        return np.array([len(prompt.inputs) for prompt in written], np.int64)

    def _write(self, sample_ids: np.ndarray) -> list[WrittenSample]:
        """The samples with these ids, in their order."""
        if all(number in self._written for number in sample_ids.tolist()):
            return [self._written[number] for number in sample_ids.tolist()]
        samples = self.samples.samples(sample_ids)
        responses = self.responses(samples)
        prompts = self.writer.write(self.requests(samples, responses))
        return [
            WrittenSample(sample, prompt.tokens, response)
            for sample, prompt, response in zip(samples, prompts, responses, strict=True)
        ]

    def num_rows(self, sample_ids: np.ndarray) -> int:
        """Response rows of these samples: the tokens of their responses."""
        items, is_text = self.samples.targets(sample_ids)
        rows = int(self.catalogue.item_lengths(items[~is_text]).sum())
        words = items[is_text]
        unknown = np.unique(words[self._text_lengths[words] == 0])
        if len(unknown):
            self._text_lengths[unknown] = [len(ids) for ids in self.writer.responses(unknown)]
        return rows + int(self._text_lengths[words].sum())

    def responses(self, samples: Sequence[PromptSample]) -> list[list[int]]:
        """The tokens of each sample's response:
        its item's own tokens, or a title in words.
        """
        items = np.array([sample.item for sample in samples], np.int64)
        in_words = [sample.item for sample in samples if _task(sample).is_text]
        words = iter(self.writer.responses(in_words) if in_words else [])
        tokens, lengths = self.catalogue.item_tokens(items), self.catalogue.item_lengths(items)
        return [
            next(words) if _task(sample).is_text else tokens[row, : lengths[row]].tolist()
            for row, sample in enumerate(samples)
        ]

    def requests(
        self, samples: Sequence[PromptSample], responses: Sequence[Sequence[int]]
    ) -> list[PromptRequest]:
        """What is asked of the writer for samples with these responses.

        Room is left for the longest item: a served model does not know which one comes.
        """
        return [
            PromptRequest(
                sample.template,
                sample.shown,
                len(response) if _task(sample).is_text else self.catalogue.depth,
            )
            for sample, response in zip(samples, responses, strict=True)
        ]


def _task(sample: PromptSample) -> Task:
    return sample.template.task


def _group(sample: PromptSample) -> int:
    """Which of RowGroups a sample's rows belong to."""
    if _task(sample).is_text:
        return 2
    return 0 if _task(sample).has_history else 1
