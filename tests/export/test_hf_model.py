"""An exported catalogue keeps transformers' generate on its items, and finds the true
best ones.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.export.constrained_decoding import (
    ItemLogitsProcessor,
    ItemTrie,
    prefix_allowed_tokens_fn,
)
from ilrec_dist.export.hf_model import Decoding, own_tokenizer, write_item_files
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.items.catalogue import Catalogue, make_catalogue, make_title_catalogue
from ilrec_dist.items.trie import Trie

CODES = np.array([[0, 1], [0, 2], [1, 1], [2, 0], [2, 2], [2, 2]])


def export(folder: Path, catalogue: Catalogue, scope: SoftmaxScope = "all") -> ItemTrie:
    n = catalogue.num_items
    ids = [f"item {number}" for number in range(n)]
    titles = [f"Title {number}" for number in range(n)]
    items = np.arange(3, dtype=np.int32)
    dataset = InteractionDataset(items, np.array([0, 3]), ["u"], ids, titles=titles)
    write_item_files(folder, dataset, catalogue, Trie(catalogue), Decoding(4, scope))
    return ItemTrie(folder)


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_allowed_tokens_are_the_continuations_of_the_items_left(data, tmp_path_factory) -> None:
    depth = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * depth), min_size=1, max_size=20))
    catalogue = make_catalogue(np.array(rows), [4] * depth)
    trie = export(tmp_path_factory.mktemp("trie"), catalogue)
    table = np.asarray(catalogue.tokens).tolist()
    excluded = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True))
    left = [row for number, row in enumerate(table) if number not in excluded]
    for length in range(depth):
        for prefix in itertools.product(range(1, 4 * depth + 1), repeat=length):
            expected = sorted({row[length] for row in left if row[:length] == list(prefix)})
            assert trie.allowed(prefix, excluded) == (expected or [trie.padding])
    for row in table:
        assert [table[number] for number in trie.items(row)] == [row] * table.count(row)


@pytest.mark.parametrize(
    ("way", "scope"), [("function", "all"), ("processor", "all"), ("processor", "valid_next")]
)
def test_beam_search_over_all_items_equals_scoring_each_of_them(
    tmp_path: Path, way: str, scope: SoftmaxScope
) -> None:
    catalogue = make_catalogue(CODES, [3, 3])
    trie, model = export(tmp_path, catalogue, scope), tiny_model(catalogue.vocab_size)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["renormalize_logits"]) == (4, scope != "all")
    prompts = torch.tensor([[1, 4, 2, 5], [0, 0, 3, 4]])
    mask = (prompts != 0).long()
    kept = dict(prompt_length=4, excluded_rows=[[0], []])
    constraint = (
        {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn(trie, **kept)}
        if way == "function"
        else {"logits_processor": [ItemLogitsProcessor(trie, num_beams=4, **kept)]}
    )
    found = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **constraint,
    )
    tokens = [row for row in dict.fromkeys(map(tuple, np.asarray(catalogue.tokens).tolist()))]
    for user in range(2):
        scores = {}
        for item in tokens:
            if user == 0 and item == tokens[0]:
                continue
            sequence = torch.cat([prompts[user], torch.tensor(item)])
            attention = torch.cat([mask[user], torch.ones(2, dtype=torch.long)])
            logits = model(sequence[None], attention_mask=attention[None]).logits[0].detach()
            total = 0.0
            for position, token in enumerate(item):
                children = [i[position] for i in tokens if i[:position] == item[:position]]
                children = sorted(set(children)) if scope == "valid_next" else slice(None)
                log_z = logits[3 + position, children].logsumexp(0)
                total += float(logits[3 + position, token] - log_z)
            scores[item] = total
        best = sorted(scores, key=lambda item: -scores[item])[:4]
        sequences = found.sequences[4 * user : 4 * user + 4, 4:].tolist()
        assert list(map(tuple, sequences)) == best
        np.testing.assert_allclose(
            found.sequences_scores[4 * user : 4 * user + 4], [scores[i] for i in best], atol=1e-4
        )


def test_a_title_that_begins_another_is_an_item_of_its_own(tmp_path: Path) -> None:
    numbers = np.array([[1, 2, 0], [1, 0, -1], [2, 0, -1]], np.int32)
    catalogue = make_title_catalogue(numbers, ["<end>", "tea", "pot"])
    trie = export(tmp_path, catalogue)
    end = catalogue.vocabulary.end
    assert end is not None
    rows = pq.read_table(tmp_path / "catalogue.parquet")
    tea, pot = (int(catalogue.vocabulary.item_tokens[number]) for number in (1, 2))
    assert trie.allowed([]) == sorted([tea, pot])
    assert trie.allowed([tea]) == sorted([end, pot])
    (row,) = trie.items([tea, end, trie.padding])
    assert rows.column("item")[row].as_py() == "item 1"
    assert rows.column("codes")[row].as_py() == "tea<end>"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == end and generation["repetition_penalty"] == 1.0


def test_the_folder_needs_nothing_of_this_project(tmp_path: Path) -> None:
    export(tmp_path, make_catalogue(CODES, [3, 3]))
    code = "import constrained_decoding as c, sys; t = c.ItemTrie(); print(t.allowed([1])); "
    code += "assert not [m for m in sys.modules if m.startswith(('ilrec', 'torch'))]"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[5, 6]"


def test_the_tokenizer_of_a_model_without_words_reads_codes_with_and_without_blanks() -> None:
    catalogue = make_catalogue(CODES, [3, 3])
    tokenizer = own_tokenizer(catalogue)
    names = catalogue.token_names()
    for row in np.asarray(catalogue.tokens).tolist():
        text = "".join(names[token] for token in row)
        assert tokenizer.encode(text).ids == row
        assert tokenizer.encode(f"{text} {text}").ids == row + row
    assert tokenizer.token_to_id("<pad>") == catalogue.vocabulary.padding
    assert tokenizer.get_vocab_size() == catalogue.vocab_size
