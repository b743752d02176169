"""Templates are checked when they are read; rendering marks the response and drops whole items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ilrec_dist.common.errors import UserError
from ilrec_dist.prompts.render import ItemTexts, choose_template, render
from ilrec_dist.prompts.template import SHIPPED, Template, read_templates

TITLES = [f"Blue kettle number {number}" for number in range(12)]
CODES = [f"<a_{number % 3}><b_{number}>" for number in range(12)]
TEXTS = ItemTexts(CODES, TITLES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer trained on the titles, with the codes as added tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    trained.train_from_iterator(TITLES, trainer)
    trained.add_tokens([f"<a_{a}>" for a in range(3)] + [f"<b_{b}>" for b in range(12)])
    return trained


def next_item(**changes: object) -> Template:
    fields: dict[str, object] = {
        "name": "t/1.1",
        "task": "next_item",
        "prompt": "Bought {history}. Next: ",
        "history": "codes",
        "response": "codes",
        "separator": ", ",
    }
    return Template(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_response_is_marked_and_its_tokens_are_those_of_the_item_alone(tokenizer) -> None:
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    for history in ("codes", "titles", "both"):
        for response in ("codes", "titles"):
            template = next_item(history=history, response=response)
            sample = render(template, [1, 2, 3], 7, TEXTS, encode, max_tokens=999, end_token=2)
            answer = sample.tokens[sample.response_start :]
            assert answer.tolist() == [*encode((CODES if response == "codes" else TITLES)[7]), 2]
            assert np.array_equal(sample.tokens[sample.rows + 1], answer)
            assert sample.tokens[: sample.response_start].tolist() == encode(sample.text[0])
    assert (
        sample.text[0]
        == "Bought " + ", ".join(TEXTS.write(i, "both") for i in (1, 2, 3)) + ". Next: "
    )


@given(count=st.integers(0, 12), limit=st.integers(12, 160))
def test_a_long_prompt_loses_its_oldest_items_whole_and_no_more_than_it_must(count, limit) -> None:
    encode = lambda text: list(text.encode())  # noqa: E731
    items = list(range(count))
    template = next_item(prompt="{history}>")
    full = len(render(template, items, 0, TEXTS, encode, max_tokens=10_000).tokens)
    sample = render(template, items, 0, TEXTS, encode, max_tokens=limit)
    kept = items[sample.dropped_items :]
    assert sample.text[0] == ", ".join(CODES[item] for item in kept) + ">"
    assert len(sample.tokens) <= limit
    if sample.dropped_items:
        assert full > limit
        longer = (
            ", ".join(CODES[item] for item in items[sample.dropped_items - 1 :]) + ">" + CODES[0]
        )
        assert len(longer) > limit


def test_a_prompt_that_cannot_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"t/1.1: the prompt without any history .* the limit is 5"):
        render(next_item(), [1], 2, TEXTS, lambda text: list(text.encode()), max_tokens=5)


def test_an_item_without_a_title_is_named() -> None:
    texts = ItemTexts(CODES, ["", *TITLES[1:]])
    with pytest.raises(UserError, match="item 0 has no title"):
        render(next_item(history="titles"), [0], 2, texts, lambda text: [1], max_tokens=9)


def test_alignment_tasks_ask_about_the_target(tokenizer) -> None:
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    for template in read_templates("lcrec"):
        sample = render(template, [1, 2], 5, TEXTS, encode, max_tokens=999)
        if template.task == "title_to_codes":
            assert TITLES[5] in sample.text[0] and sample.text[1] == CODES[5]
        if template.task == "codes_to_title":
            assert CODES[5] in sample.text[0] and sample.text[1] == TITLES[5]


def test_every_shipped_file_is_read_and_templates_are_drawn_by_seed() -> None:
    templates = [t for file in SHIPPED.glob("*.yaml") for t in read_templates(file.stem)]
    assert {template.task for template in templates} == {
        "next_item",
        "title_to_codes",
        "codes_to_title",
    }
    drawn = [choose_template(templates, 0, user, 3).name for user in range(200)]
    assert set(drawn) == {template.name for template in templates}
    assert drawn == [choose_template(templates, 0, user, 3).name for user in range(200)]
    assert drawn != [choose_template(templates, 1, user, 3).name for user in range(200)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a list of groups"),
        ("- {task: guess, templates: [x]}", "group 1: task 'guess'; expected one of next_item"),
        (
            "- {templates: ['no place']}",
            r"group 1, template 1: .* \{history\} exactly once, found none",
        ),
        ("- {templates: ['{history} {user}']}", r"found \{history\}, \{user\}"),
        ("- {templates: ['{history']}", "write a brace itself twice"),
        ("- {templates: ['{history}'], histroy: codes}", "unknown key 'histroy'"),
        ("- {templates: ['{history}'], history: words}", "history 'words'; expected one of codes"),
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
