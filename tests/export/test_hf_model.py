"""An exported catalogue keeps transformers' generate on its items, and finds the true
best ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ilrec_dist.export.constrained_decoding import ItemLogitsProcessor, prefix_allowed_tokens_fn
from ilrec_dist.export.hf_model import own_tokenizer
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.items.catalogue import make_catalogue, make_title_catalogue
from tests.support.exported import export_items

CODES = np.array([[0, 1], [0, 2], [1, 1], [2, 0], [2, 2], [2, 2]])


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


@pytest.mark.parametrize(
    ("way", "scope"), [("function", "all"), ("processor", "all"), ("processor", "valid_next")]
)
def test_beam_search_over_all_items_equals_scoring_each_of_them(
    tmp_path: Path, way: str, scope: SoftmaxScope
) -> None:
    catalogue = make_catalogue(CODES, [3, 3])
    trie, model = export_items(tmp_path, catalogue, scope), tiny_model(catalogue.vocab_size)
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
    trie = export_items(tmp_path, catalogue)
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
