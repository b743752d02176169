"""Catalogues as an export has them, the lists of a run, and those that transformers
makes of what the run was exported to.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ilrec_dist.cli.main import main
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.export.constrained_decoding import ItemTrie, prefix_allowed_tokens_fn
from ilrec_dist.export.hf_model import Decoding, write_item_files
from ilrec_dist.inference.parallel_head import SoftmaxScope
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.trie import Trie


def export_items(folder: Path, catalogue: Catalogue, scope: SoftmaxScope = "all") -> ItemTrie:
    """The trie of a catalogue whose item n is "item n", from its files in `folder`."""
    numbers = range(catalogue.num_items)
    ids, titles = ([f"{word} {n}" for n in numbers] for word in ("item", "Title"))
    items = np.zeros(3, dtype=np.int32)
    dataset = InteractionDataset(items, np.array([0, 3]), ["u"], ids, titles=titles)
    write_item_files(folder, dataset, catalogue, Trie(catalogue), Decoding(4, scope))
    return ItemTrie(folder)


def catalogue_ids(exported: Path) -> list[str]:
    ids: list[str] = pq.read_table(exported / "catalogue.parquet").column("item").to_pylist()
    return ids


def recommended(
    run: Path, histories: list[list[str]], folder: Path, *flags: str
) -> list[tuple[str, float]]:
    """(item, score) of `ilrec recommend` with `flags`, one history after the other."""
    users = [f"user {number}" for number in range(len(histories))]
    table = pa.table({"user": users, "items": pa.array(histories, pa.list_(pa.string()))})
    pq.write_table(table, folder / "histories.parquet")
    out = folder / "out.parquet"
    words = ["recommend", str(run), "--histories", str(folder / "histories.parquet")]
    assert main([*words, *flags, "--out", str(out)]) == 0
    return [(row["item"], row["score"]) for row in pq.read_table(out).to_pylist()]


def generated(exported: Path, history: list[str], beams: int) -> list[tuple[str, float]]:
    """(item, score) of `generate` under the exported constraint, best first."""
    catalogue = pq.read_table(exported / "catalogue.parquet")
    ids = catalogue.column("item").to_pylist()
    codes = dict(zip(ids, catalogue.column("codes").to_pylist(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "".join(codes[item] for item in history)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ranked(exported, prompt, beams)


def asked(exported: Path, history: list[str]) -> Tensor:
    """The exported prompt about a history, in the model's own tokens; int64 [1, P]."""
    catalogue = pq.read_table(exported / "catalogue.parquet")
    said = json.loads((exported / "prompt.json").read_text())
    form = "title" if said["history"] == "titles" else "codes"
    ids, names = (catalogue.column(name).to_pylist() for name in ("item", form))
    written = dict(zip(ids, names, strict=True))
    text = said["prompt"].format(history=said["separator"].join(written[i] for i in history))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    if said["chat"]:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not said["chat"])
    return torch.as_tensor(tokens.input_ids)


def ranked(exported: Path, prompt: Tensor, beams: int) -> list[tuple[str, float]]:
    """(item, score) of `generate` after the prompt, int64 [1, P], best first."""
    ids = catalogue_ids(exported)
    trie = ItemTrie(exported)
    found = AutoModelForCausalLM.from_pretrained(exported).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=beams,
        num_return_sequences=beams,
        output_scores=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn(trie, prompt.shape[1]),
    )
    return [
        (ids[row], float(score))
        for sequence, score in zip(found.sequences, found.sequences_scores, strict=True)
        for row in trie.items(sequence[prompt.shape[1] :].tolist())
    ]
