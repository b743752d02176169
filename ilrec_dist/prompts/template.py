"""Prompt templates, read from YAML files: text with places for the history and the response."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from ilrec_dist.common.errors import UserError

Form = Literal["codes", "titles", "both"]
# The tasks that LC-Rec (arXiv 2311.09049) and MiniOneRec train, and what stands in each one's
# prompt and response.
TASKS = ("next_item", "title_to_codes", "codes_to_title")
SHIPPED = Path(__file__).with_name("templates")
_KEYS = {"task", "history", "response", "separator", "templates", "system"}


@dataclass(frozen=True)
class Template:
    """One way to ask.

    `prompt` has the placeholder `{history}` (task next_item) or `{item}` (the other tasks);
    the response follows it. `history` says how the items of the prompt are written, `response`
    how the answer is; both write "title codes". `system` is the system message of a chat
    template, if any.
    """

    name: str
    task: str
    prompt: str
    history: Form
    response: Literal["codes", "titles"]
    separator: str
    system: str | None = None

    @property
    def placeholder(self) -> str:
        """The field that the template's text must have exactly once."""
        return "history" if self.task == "next_item" else "item"


def read_templates(path: str | Path) -> list[Template]:
    """All templates of a YAML file, or those of a shipped one by its name (`lcrec`).

    Raises UserError that names the file, the template and what was expected.
    """
    file = Path(path)
    if not file.suffix and (SHIPPED / f"{path}.yaml").exists():
        file = SHIPPED / f"{path}.yaml"
    try:
        groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(entry.stem for entry in SHIPPED.glob("*.yaml")))
        raise UserError(
            f"{path}: no such file of templates; expected a YAML file, or one that ships: {shipped}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as YAML ({reason})") from None
    if not isinstance(groups, list) or not groups:
        raise UserError(f"{file}: expected a list of groups, each with task and templates")
    return [
        template
        for number, group in enumerate(groups, start=1)
        for template in _read_group(group, f"{file}: group {number}", file.stem, number)
    ]


def _read_group(group: Any, where: str, stem: str, number: int) -> list[Template]:
    if not isinstance(group, dict) or not isinstance(group.get("templates"), list):
        raise UserError(f"{where}: expected a mapping with task and templates")
    unknown = sorted(set(map(str, group)) - _KEYS)
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(sorted(_KEYS))}")
    task = group.get("task", "next_item")
    if task not in TASKS:
        raise UserError(f"{where}: task {task!r}; expected one of {', '.join(TASKS)}")
    default = "titles" if task == "title_to_codes" else "codes"
    history = group.get("history", default)
    if history not in get_args(Form):
        raise UserError(
            f"{where}: history {history!r}; expected one of {', '.join(get_args(Form))}"
        )
    response = group.get("response", "titles" if task == "codes_to_title" else "codes")
    if response not in ("codes", "titles"):
        raise UserError(f"{where}: response {response!r}; expected codes or titles")
    templates = []
    for number_in_group, text in enumerate(group["templates"], start=1):
        template = Template(
            name=f"{stem}/{number}.{number_in_group}",
            task=task,
            prompt=text,
            history=history,
            response=response,
            separator=group.get("separator", ", "),
            system=group.get("system"),
        )
        _check(template, f"{where}, template {number_in_group}")
        templates.append(template)
    return templates


def _check(template: Template, where: str) -> None:
    if not isinstance(template.prompt, str):
        raise UserError(f"{where}: expected a text, found {template.prompt!r}")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template.prompt) if field]
    except ValueError as error:
        raise UserError(f"{where}: {error}; write a brace itself twice") from None
    if fields != [template.placeholder]:
        raise UserError(
            f"{where}: expected the placeholder {{{template.placeholder}}} exactly once, found "
            f"{', '.join(f'{{{field}}}' for field in fields) or 'none'}"
        )
