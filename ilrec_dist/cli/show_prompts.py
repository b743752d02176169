"""`ilrec show-prompts`: samples of a training
as text and tokens, with the response marked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.items.prompt_writer import token_texts
from ilrec_dist.pipeline.artifacts import RunArtifacts, with_hub_model
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.prompting import batch_source, check_prompts
from ilrec_dist.samples.prompt_batches import PromptBatchMaker
from ilrec_dist.samples.prompt_samples import PromptSample


def run(arguments: argparse.Namespace) -> None:
    if arguments.users < 1:
        raise UserError(f"--users {arguments.users}: expected at least 1")
    config = with_hub_model(load_config(arguments.config, arguments.overrides))
    for line in prompt_lines(config, arguments.users):
        print_plain(line)


def prompt_lines(config: Config, users: int) -> Iterator[str]:
    """The lines that show the last sample of each of the first `users` users.

    As many samples of every other task follow. Reads what the stages prepare
    and index wrote, and raises UserError where they are not current, where
    the configuration has no prompts, and where a prompt cannot be written.
    """
    if config.prompts.templates is None:
        raise UserError(
            "prompts.templates: is null, so that samples are plain sequences of codes; name "
            "templates, such as prompts.templates=lcrec"
        )
    stages = open_run(config)
    for stage in ("prepare", "index"):
        stages.require_current(stage)
    artifacts = RunArtifacts(config)
    check_prompts(config, artifacts)
    maker = batch_source(config, artifacts, config.train.seeds[0])
    assert isinstance(maker, PromptBatchMaker)
    samples = maker.samples.samples(_shown_ids(maker, users))
    responses = maker.responses(samples)
    prompts = maker.writer.write(maker.requests(samples, responses))
    text_of = token_texts(artifacts.language_model)
    for sample, prompt, response in zip(samples, prompts, responses, strict=True):
        size = len(prompt.tokens) + len(response)
        yield f"{_title(sample, artifacts)}: {size} tokens, {len(response)} of them the response"
        if prompt.dropped_items:
            yield f"  the {prompt.dropped_items} oldest items are left out (prompts.max_tokens)"
        answer = "".join(text_of(token) for token in response)
        yield f"  text: {prompt.text}[[{answer}]]".replace("\n", "\n        ")
        words = [f"{token}={text_of(token)!r}" for token in [*prompt.tokens, *response]]
        words[len(prompt.tokens)] = f"[[ {words[len(prompt.tokens)]}"
        yield f"  tokens: {' '.join(words)} ]]"


def _shown_ids(maker: PromptBatchMaker, users: int) -> np.ndarray:
    samples = maker.samples
    # A user's windows end with the longest history; the samples of next_item are the windows.
    first = samples.windows.first
    with_windows = np.flatnonzero(np.diff(first) > 0)[:users]
    of_tasks = [
        np.arange(begin, min(begin + users, end))
        for begin, end in zip(samples.first[1:-1], samples.first[2:], strict=True)
    ]
    return np.concatenate([first[with_windows + 1] - 1, *of_tasks])


def _title(sample: PromptSample, artifacts: RunArtifacts) -> str:
    task, template = sample.template.task, sample.template.name
    data = artifacts.training
    if not task.has_history:
        return f"{task.name}, item {data.item_ids[sample.item]}, template {template}"
    user = data.user_ids[sample.user]
    return f"{task.name}, user {user}, item {sample.position + 1}, template {template}"
