"""Recommends from a folder that `ilrec export` wrote, with transformers alone.

    python examples/recommend_with_transformers.py FOLDER [--history ITEM ...] [--top 5]

It needs transformers, torch and pyarrow, and nothing of this project: the
folder brings the weights, the tokenizer, the prompt that the model answers,
the catalogue, and the constraint that keeps `generate` on its items.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--history", nargs="+", help="item ids, oldest first (default: some three)")
    parser.add_argument("--top", type=int, default=5)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.folder))
    # The folder's own file.
    from constrained_decoding import ItemLogitsProcessor, ItemTrie

    catalogue = pq.read_table(arguments.folder / "catalogue.parquet").to_pylist()
    rows = {row["item"]: row for row in catalogue}
    history = arguments.history or [row["item"] for row in catalogue[:: len(catalogue) // 3][:3]]
    asked = json.loads((arguments.folder / "prompt.json").read_text(encoding="utf-8"))
    keys = {"titles": ["title"], "codes": ["codes"], "both": ["title", "codes"]}[asked["history"]]
    written = [" ".join(rows[item][key] for key in keys) for item in history]
    text = asked["prompt"].format(history=asked["separator"].join(written))
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    if asked["chat"]:
        messages = [{"role": "user", "content": text}]
        if asked["system"] is not None:
            messages.insert(0, {"role": "system", "content": asked["system"]})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=not asked["chat"])
    length, trie = prompt.input_ids.shape[1], ItemTrie(arguments.folder)
    seen = [number for number, row in enumerate(catalogue) if row["item"] in history]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    num_beams = max(model.generation_config.num_beams, arguments.top)
    beams = model.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        num_beams=num_beams,
        num_return_sequences=arguments.top,
        output_scores=True,
        return_dict_in_generate=True,
        logits_processor=[ItemLogitsProcessor(trie, length, num_beams, [seen])],
        renormalize_logits=False,
    )
    print(text)
    for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        for number in trie.items(sequence[length:].tolist()):
            row = catalogue[number]
            print(f"{score:8.3f}  {row['item']}  {row['title']}  {row['codes']}")


if __name__ == "__main__":
    main()
