"""Prompt templates, read from YAML files: text
with places for the history and the response.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from ilrec_dist.common.errors import UserError
from ilrec_dist.prompts.tasks import NEXT_ITEM, TASKS, Form, Task

SHIPPED = Path(__file__).with_name("templates")
_KEYS = {"task", "history", "response", "separator", "templates", "system"}


@dataclass(frozen=True)
class Template:
    """One way to ask.

    `prompt` has the placeholder `{history}`, or `{item}` where the task asks about one
    item; the response follows it. `history` says how the items of the prompt are
    written, `response` how the answer is. `system` is the system message of a chat
    template, if any.
    """

    name: str
    task: Task
    prompt: str
    history: Form
    response: Literal["codes", "titles"]
    separator: str
    system: str | None = None

    @property
    def placeholder(self) -> str:
        """The field that the template's text must have exactly once."""
        return "history" if self.task.has_history else "item"

    def as_dict(self) -> dict[str, str | None]:
        """What `template_from_dict` makes the same template of."""
        return {
            "name": self.name,
            "task": self.task.name,
            "prompt": self.prompt,
            "history": self.history,
            "response": self.response,
            "separator": self.separator,
            "system": self.system,
        }


def template_from_dict(tree: dict[str, Any]) -> Template:
    """The inverse of `Template.as_dict`."""
    return Template(**(tree | {"task": TASKS[tree["task"]]}))


def template_file(name: str | Path) -> Path:
    """The file of templates of that path, or the shipped one of that name (`lcrec`)."""
    file = Path(name)
    if not file.suffix and (SHIPPED / f"{name}.yaml").exists():
        return SHIPPED / f"{name}.yaml"
    return file


def read_templates(path: str | Path) -> list[Template]:
    """All templates of a YAML file, or those of a shipped one by its name (`lcrec`).

    Raises UserError that names the file, the template and what was expected.
    """
    file = template_file(path)
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
    name = group.get("task", NEXT_ITEM)
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"{where}: task {name!r}; expected one of {', '.join(TASKS)}")
    task = TASKS[name]
    history = _form(group, "history", task.history, get_args(Form), where)
    response = _form(group, "response", task.response, ("codes", "titles"), where)
    for key in ("separator", "system"):
        if not isinstance(group.get(key, ""), str):
            raise UserError(f"{where}: {key} {group[key]!r}; expected a text")
    templates = []
    for number_in_group, text in enumerate(group["templates"], start=1):
        template = Template(
            name=f"{stem}/{number}.{number_in_group}",
            task=task,
            prompt=text,
            history=history,  # type: ignore[arg-type]
            response=response,  # type: ignore[arg-type]
            separator=group.get("separator", ", "),
            system=group.get("system"),
        )
        _check(template, f"{where}, template {number_in_group}")
        templates.append(template)
    return templates


def _form(
    group: dict[str, Any], key: str, fixed: str | None, known: tuple[str, ...], where: str
) -> str:
    """How a group writes items; `fixed` where its task decides that."""
    form = group.get(key, fixed or "codes")
    if form not in known:
        raise UserError(f"{where}: {key} {form!r}; expected one of {', '.join(known)}")
    if fixed is not None and form != fixed:
        raise UserError(
            f"{where}: {key} {form!r}, but its task writes {fixed} there; leave {key} out"
        )
    return str(form)


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
