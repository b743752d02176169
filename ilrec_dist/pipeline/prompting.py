"""A run's samples and inputs: plain sequences of items, or prompts (METHOD.md §10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.tree import Config
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.inference.inputs import InputForm, PlainSequences, Prompts
from ilrec_dist.items.prompt_writer import make_prompt_writer
from ilrec_dist.model.hf.config import read_config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.prompts.tasks import NEXT_ITEM
from ilrec_dist.prompts.template import Template, read_templates, template_file, template_from_dict
from ilrec_dist.prompts.writer import PromptRequest, PromptWriter
from ilrec_dist.samples.collate import BatchMaker
from ilrec_dist.samples.prefetch import BatchSource
from ilrec_dist.samples.prompt_batches import PromptBatchMaker
from ilrec_dist.samples.prompt_samples import PromptSamples, epoch_length
from ilrec_dist.samples.windows import Windows, steps_per_epoch

# Prompts that are written at a time where all are checked.
CHUNK_ITEMS = 10_000


def template_files(config: Config) -> list[Path]:
    """The file of templates, whose bytes decide
    what is trained; none for plain sequences.

    Raises UserError where it cannot be read.
    """
    if config.prompts.templates is None:
        return []
    read_templates(config.prompts.templates)
    return [template_file(config.prompts.templates)]


def used_templates(config: Config) -> list[Template]:
    """The templates of the tasks that have a share."""
    assert config.prompts.templates is not None
    shares = config_to_dict(config.prompts.shares)
    return [
        template
        for template in read_templates(config.prompts.templates)
        if shares[template.task.name] > 0
    ]


def prompt_writer(config: Config, artifacts: RunArtifacts) -> PromptWriter:
    """The run's writer of prompts, with its catalogue and its model's tokenizer."""
    prompts, folder = config.prompts, artifacts.language_model
    return make_prompt_writer(
        folder,
        artifacts.catalogue,
        artifacts.dataset.titles,
        prompts.max_tokens or read_config(folder).max_positions,
        prompts.chat,
    )


def served_prompt(config: Config) -> dict[str, Any] | None:
    """What a finished training keeps of its prompts, as JSON; None for plain sequences.

    It is evaluated and served with the first template of the task next_item.
    """
    if config.prompts.templates is None:
        return None
    template = _first_template(config).as_dict()
    return {"settings": config_to_dict(config.prompts), "template": template}


def _first_template(config: Config) -> Template:
    return next(t for t in used_templates(config) if t.task.name == NEXT_ITEM)


def input_form(config: Config, artifacts: RunArtifacts, prompt: dict[str, Any] | None) -> InputForm:
    """What a model reads of a history: `prompt`
    is what its training kept (`served_prompt`).
    """
    max_history = config.train.max_history
    if prompt is None:
        return PlainSequences(artifacts.catalogue, max_history)
    return Prompts(
        artifacts.catalogue,
        max_history,
        prompt_writer(config, artifacts),
        template_from_dict(prompt["template"]),
    )


def batch_source(config: Config, artifacts: RunArtifacts, seed: int) -> BatchSource:
    """What makes a training's batches of the training data."""
    data, windows = artifacts.training, artifacts.training_windows(config.train)
    if config.prompts.templates is None:
        return BatchMaker(data, artifacts.catalogue, artifacts.trie, windows)
    writer = prompt_writer(config, artifacts)
    shares = config_to_dict(config.prompts.shares)
    samples = PromptSamples(data, windows, used_templates(config), shares, writer, seed)
    return PromptBatchMaker(artifacts.catalogue, artifacts.trie, samples, writer)


def target_batches(
    config: Config, artifacts: RunArtifacts, dataset: InteractionDataset, windows: Windows
) -> BatchSource:
    """What makes batches of the targets of
    `windows` alone, asked as a trained model is.
    """
    if config.prompts.templates is None:
        return BatchMaker(dataset, artifacts.catalogue, artifacts.trie, windows)
    writer, template = prompt_writer(config, artifacts), _first_template(config)
    samples = PromptSamples(dataset, windows, [template], {NEXT_ITEM: 1.0}, writer, 0)
    return PromptBatchMaker(artifacts.catalogue, artifacts.trie, samples, writer)


def epoch_samples(config: Config, artifacts: RunArtifacts) -> int:
    """Samples of an epoch."""
    windows = artifacts.training_windows(config.train)
    if config.prompts.templates is None:
        return len(windows)
    return epoch_length(len(windows), config_to_dict(config.prompts.shares))


def epoch_steps(config: Config, artifacts: RunArtifacts) -> int:
    """Optimizer steps of an epoch."""
    return steps_per_epoch(range(epoch_samples(config, artifacts)), config.train.batch_size)


def check_prompts(config: Config, artifacts: RunArtifacts) -> None:
    """Raise UserError where a prompt of this run cannot be written.

    That is an item without a title that a template writes, and
    a prompt that does not fit with all its history left out.
    """
    prompts, templates = config.prompts, used_templates(config)
    positions = read_config(artifacts.language_model).max_positions
    if prompts.max_tokens is not None and prompts.max_tokens > positions:
        raise UserError(
            f"prompts.max_tokens: {prompts.max_tokens} tokens, and the model in backbone.from has "
            f"{positions} positions; lower prompts.max_tokens"
        )
    if any(_writes_titles(template) for template in templates):
        _check_titles(artifacts)
    writer, items = prompt_writer(config, artifacts), np.arange(artifacts.dataset.num_items)
    depth = artifacts.catalogue.depth
    answers = depth
    if any(template.task.is_text for template in templates):
        for chunk in _chunks(items):
            answers = max(answers, *(len(tokens) for tokens in writer.responses(chunk)))
    for template in templates:
        reserve = answers if template.task.is_text else depth
        if template.task.has_history:
            writer.write([PromptRequest(template, [], reserve)])
            continue
        for chunk in _chunks(items):
            writer.write([PromptRequest(template, [item], reserve) for item in chunk])


def _writes_titles(template: Template) -> bool:
    return template.history in ("titles", "both") or template.response == "titles"


def _check_titles(artifacts: RunArtifacts) -> None:
    dataset = artifacts.dataset
    titles: Sequence[str] = dataset.titles or [""] * dataset.num_items
    for item, title in enumerate(titles):
        if not title.strip():
            raise UserError(
                f"prompts.templates: item {dataset.item_ids[item]!r} has no title, which a "
                "template writes; give every item one in the item table (data.items_path), or "
                "take templates of codes alone"
            )


def _chunks(items: np.ndarray) -> list[np.ndarray]:
    return [items[first : first + CHUNK_ITEMS] for first in range(0, len(items), CHUNK_ITEMS)]
