"""The tasks that prompts pose: what each one's prompt and response hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How items are written. `both` writes "title codes".
Form = Literal["codes", "titles", "both"]


@dataclass(frozen=True)
class Task:
    """What a prompt asks for.

    `history` and `response` are None where the
    templates say how items are written there.
    """

    name: str
    # Whether the prompt shows a history and the response is the item after it; otherwise both
    # are of the same one item.
    has_history: bool
    history: Form | None
    response: Literal["codes", "titles"] | None
    # Whether the response is words, which plain cross-entropy over the whole vocabulary trains,
    # and not an item's own tokens (METHOD.md §10).
    is_text: bool = False


# The one that is evaluated and served.
NEXT_ITEM = "next_item"

# The alignment tasks of LC-Rec (arXiv 2311.09049) stand below the first one.
TASKS = {
    task.name: task
    for task in (
        Task(NEXT_ITEM, has_history=True, history=None, response=None),
        Task("titles_to_next_codes", True, "titles", "codes"),
        Task("codes_to_next_title", True, "codes", "titles", is_text=True),
        Task("title_to_codes", False, "titles", "codes"),
        Task("codes_to_title", False, "codes", "titles", is_text=True),
    )
}
