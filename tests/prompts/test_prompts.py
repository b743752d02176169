"""Templates are checked when they are read;
long prompts lose whole items, the oldest first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ilrec_dist.common.errors import UserError
from ilrec_dist.prompts.tasks import NEXT_ITEM, TASKS
from ilrec_dist.prompts.template import SHIPPED, Template, read_templates, template_from_dict
from ilrec_dist.prompts.writer import ItemTexts, PromptRequest, PromptWriter

TITLES = [f"Blue kettle number {number}" for number in range(12)]
CODES = [f"<a_{number % 3}><b_{number}>" for number in range(12)]
TEXTS = ItemTexts(CODES, TITLES, 2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer trained on the titles, with the codes as added tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    trained.train_from_iterator([f"Bought {title}; {title}" for title in TITLES], trainer)
    trained.add_tokens([f"<a_{a}>" for a in range(3)] + [f"<b_{b}>" for b in range(12)])
    return trained


def next_item(**changes: object) -> Template:
    fields: dict[str, object] = {
        "name": "t/1.1",
        "task": TASKS[NEXT_ITEM],
        "prompt": "Bought {history}. Next: ",
        "history": "codes",
        "response": "codes",
        "separator": ", ",
    }
    return Template(**{**fields, **changes})  # type: ignore[arg-type]


def letters(max_tokens: int, texts: ItemTexts = TEXTS, **options: object) -> PromptWriter:
    """A writer for a model whose tokens are bytes."""
    encode = lambda texts: [list(text.encode()) for text in texts]  # noqa: E731
    return PromptWriter(texts, encode, encode, max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def test_prompts_are_tokenized_whole(tokenizer) -> None:
    encode = lambda texts: [tokenizer.encode(text).ids for text in texts]  # noqa: E731
    writer = PromptWriter(TEXTS, encode, encode, max_tokens=999, end_token=2)
    requests = [
        PromptRequest(next_item(history=form, separator="; "), [1, 2, 3], 2)
        for form in ("codes", "titles", "both")
    ]
    prompts = writer.write(requests)
    for request, prompt in zip(requests, prompts, strict=True):
        written = [TEXTS.write(item, request.template.history) for item in (1, 2, 3)]
        assert prompt.text == "Bought " + "; ".join(written) + ". Next: "
        assert prompt.tokens == tokenizer.encode(prompt.text).ids and prompt.dropped_items == 0
    # The tokens of the pieces would be others: blanks belong to the words behind them.
    pieces = ["Bought ", TITLES[1], "; ", TITLES[2], "; ", TITLES[3], ". Next: "]
    assert prompts[1].tokens != sum(encode(pieces), [])
    assert writer.responses([4]) == [[*tokenizer.encode(TITLES[4]).ids, 2]]


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    limit=st.integers(12, 160),
    reserve=st.integers(1, 11),
)
def test_a_long_prompt_loses_its_oldest_items_whole_and_no_more_than_it_must(
    counts, limit, reserve
) -> None:
    template = next_item(prompt="{history}>")
    requests = [PromptRequest(template, list(range(count)), reserve) for count in counts]
    for count, prompt in zip(counts, letters(limit).write(requests), strict=True):
        kept = list(range(count))[prompt.dropped_items :]
        assert prompt.text == ", ".join(CODES[item] for item in kept) + ">"
        assert list(prompt.text.encode()) == prompt.tokens
        assert len(prompt.tokens) + reserve <= limit
        if prompt.dropped_items:
            longer = range(prompt.dropped_items - 1, count)
            text = ", ".join(CODES[item] for item in longer) + ">"
            assert len(text) + reserve > limit


def test_a_prompt_that_cannot_fit_is_refused() -> None:
    # Without any history the prompt has 15 letters.
    for items in ([1], []):
        assert letters(20).write([PromptRequest(next_item(), items, 5)])
        with pytest.raises(UserError, match=r"t/1.1: the prompt without any .* limit is 20 "):
            letters(20).write([PromptRequest(next_item(), items, 6)])
    task = next_item(task=TASKS["title_to_codes"], prompt="Index of {item}: ", history="titles")
    with pytest.raises(UserError, match=r"t/1.1: the prompt and its response have 33 tokens"):
        letters(20).write([PromptRequest(task, [1], 2)])


def test_an_item_without_a_title_is_named() -> None:
    writer = letters(99, ItemTexts(CODES, [" ", *TITLES[1:]]))
    with pytest.raises(UserError, match="item 0 has no title"):
        writer.write([PromptRequest(next_item(history="titles"), [0], 2)])
    with pytest.raises(UserError, match="no end-of-text token"):
        writer.responses([1])


def test_a_chat_template_wraps_the_prompt() -> None:
    chat = lambda text, system: f"<{system}|{text}|"  # noqa: E731
    template = next_item(system="Shop")
    (prompt,) = letters(99, chat=chat).write([PromptRequest(template, [2], 2)])
    assert prompt.text == "<Shop|Bought <a_2><b_2>. Next: |"


def test_estimated_sizes_order_items_as_their_tokens_do() -> None:
    texts = ItemTexts(CODES[:3], ["a", "a b c d e f g h", "a" * 40], 2)
    writer = letters(99, texts)
    assert (np.diff(writer.item_sizes("titles")) > 0).all()
    assert writer.item_sizes("codes").tolist() == [3, 3, 3]
    assert (writer.item_sizes("both") == writer.item_sizes("titles") + 2).all()


def test_every_shipped_file_is_read_and_survives_a_round_trip() -> None:
    templates = [t for file in SHIPPED.glob("*.yaml") for t in read_templates(file.stem)]
    assert {template.task for template in templates} == set(TASKS.values())
    for template in templates:
        assert template_from_dict(template.as_dict()) == template
        if not template.task.has_history:
            assert {template.history, template.response} == {"codes", "titles"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a list of groups"),
        ("- {task: guess, templates: [x]}", "group 1: task 'guess'; expected one of next_item"),
        ("- {task: [next_item], templates: [x]}", "task \\['next_item'\\]; expected one of"),
        (
            "- {templates: ['no place']}",
            r"group 1, template 1: .* \{history\} exactly once, found none",
        ),
        ("- {templates: ['{history} {user}']}", r"found \{history\}, \{user\}"),
        ("- {templates: ['{history']}", "write a brace itself twice"),
        ("- {templates: ['{history}'], histroy: codes}", "unknown key 'histroy'"),
        ("- {templates: ['{history}'], history: words}", "history 'words'; expected one of codes"),
        ("- {templates: ['{history}'], separator: 3}", "separator 3; expected a text"),
        (
            "- {task: codes_to_title, history: titles, templates: ['{item}']}",
            "history 'titles', but its task writes codes there; leave history out",
        ),
        ("- [", "cannot be read as YAML"),
    ],
)
def test_bad_templates_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_templates(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_file_names_what_ships() -> None:
    with pytest.raises(UserError, match="no such file of templates; .* lcrec, titles"):
        read_templates("nothing")
