"""The configuration section `prompts`: what
a sample looks like in words (METHOD.md §10).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Optional

from annotated_types import MinLen

from ilrec_dist.common.config_fields import (
    Affects,
    Bool,
    NonNegativeFloat,
    OnlyIf,
    Positive,
    PositiveFloat,
    section,
)


def _is_pretrained(config: Any) -> bool:
    return config.backbone.from_ is not None


def _has_templates(config: Any) -> bool:
    return config.prompts.templates is not None


def _has_codes(config: Any) -> bool:
    return bool(config.items.form != "titles")


_IF_TEMPLATES = OnlyIf("prompts.templates", _has_templates)
_IF_CODES = OnlyIf("items.form semantic or atomic", _has_codes)


@section(affects="train")
class TaskShares:
    """The shares of samples that pose each task; they add up to 1."""

    # The history, and the item that comes next. It is what evaluation and serving ask.
    next_item: PositiveFloat = 1.0
    # The history as titles, and the codes of the item that comes next.
    titles_to_next_codes: Annotated[NonNegativeFloat, _IF_CODES] = 0.0
    # The history as codes, and the title of the item that comes next.
    codes_to_next_title: Annotated[NonNegativeFloat, _IF_CODES] = 0.0
    # An item's title, and its codes.
    title_to_codes: Annotated[NonNegativeFloat, _IF_CODES] = 0.0
    # An item's codes, and its title.
    codes_to_title: Annotated[NonNegativeFloat, _IF_CODES] = 0.0


@section(affects="train")
class PromptsConfig:
    """Templates, the length limit, and the tasks that are trained side by side."""

    # A YAML file of templates, or the name of one that ships; null: a history is the plain
    # sequence of its items' tokens. The file's bytes are an input of the training.
    templates: Annotated[
        Optional[Annotated[str, MinLen(1)]],
        Affects(),
        OnlyIf("a model in backbone.from, whose tokenizer reads the words", _is_pretrained),
    ] = None
    # Whether prompts are messages in the model's own chat template.
    chat: Annotated[Bool, _IF_TEMPLATES] = False
    # Tokens of a prompt and its response, at most: longer ones lose their oldest items. None: the
    # model's positions.
    max_tokens: Annotated[Optional[Positive], _IF_TEMPLATES] = None
    shares: Annotated[TaskShares, _IF_TEMPLATES] = field(default_factory=TaskShares)
