#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: constrained beam search with more beams than legal sequences returns token id -1
# and repeats sequences.
#
# Behaviour: generate(num_beams=6, num_return_sequences=6, prefix_allowed_tokens_fn=...) over a trie of three sequences
# returns the three, then fillers: sequences that were already returned, and some that contain the token id -1. The
# fillers' sequences_scores are -1e9; with length_penalty=1.0 and two tokens they are -5e8, and generally -1e9 divided by
# the length. No warning is given. tokenizers' decode raises OverflowError for the whole batch.
# Output seen: [1,4] -3.6, [2,4] -6.0, [1,5] -8.9, [1,5] -1e9, [-1,-1] -1e9, [2,4] -1e9.
# Why it matters: retrieval over a catalogue asks for the top k of what is left, and near the end of a catalogue, under an
# allow-list, or when seen items are excluded, fewer than k sequences are left. Looking the sequences up as items then
# counts an item twice, or fails on an id that no vocabulary has. Drop what scores below about -1e6 before decoding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/beams.py" <<'PY'
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

LEGAL = [(1, 4), (1, 5), (2, 4)]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.5, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.tensor([[3, 3, 3]])


def allowed(_, tokens):
    begun = tuple(tokens[prompt.shape[1]:].tolist())
    return sorted({legal[len(begun)] for legal in LEGAL if legal[: len(begun)] == begun}) or [0]


def beams(length_penalty):
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), num_beams=6, num_return_sequences=6,
        max_new_tokens=2, length_penalty=length_penalty, do_sample=False, output_scores=True,
        return_dict_in_generate=True, prefix_allowed_tokens_fn=allowed,
    )
    sequences = [tuple(row[prompt.shape[1]:].tolist()) for row in found.sequences]
    return sequences, found.sequences_scores.tolist()


negative = []
for penalty, filler in ((0.0, -1e9), (1.0, -5e8)):
    sequences, scores = beams(penalty)
    print(f"length_penalty {penalty}: " + ", ".join(f"{s} {x:.4g}" for s, x in zip(sequences, scores)))
    assert sorted(sequences[:3]) == LEGAL and min(scores[:3]) > -100
    assert all(abs(score / filler - 1) < 0.01 for score in scores[3:]), "the fillers' scores changed"
    negative += [sequence for sequence in sequences[3:] if -1 in sequence]
    assert set(sequences[3:]) & set(LEGAL), "no filler repeats a legal sequence any more"
assert negative, "no filler has the token id -1 any more"
words = Tokenizer(models.WordLevel({str(token): token for token in range(10)}, unk_token="0"))
try:
    words.decode_batch([list(sequence) for sequence in negative])
except OverflowError as error:
    print("decode_batch: OverflowError:", error)
else:
    raise AssertionError("decode_batch takes the token id -1 now")
PY
"$folder/venv/bin/python" "$folder/beams.py" 2>&1 | grep -E "^(length|decode|Assert)"
