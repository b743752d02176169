"""Keeps `generate` of transformers on the items of this folder.

It needs nothing but Python: the logits processor uses the tensors that it is given.

    from constrained_decoding import ItemTrie, prefix_allowed_tokens_fn
    trie = ItemTrie(folder)
    length = prompts["input_ids"].shape[1]
    beams = model.generate(
        **prompts, num_beams=20, num_return_sequences=20, length_penalty=0.0,
        max_new_tokens=trie.depth, output_scores=True, return_dict_in_generate=True,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn(trie, length))
    items = [trie.items(sequence[length:].tolist()) for sequence in beams.sequences]

Prompts of several lengths are padded on the left. A model that was trained with a
masked softmax (`ItemTrie.masked_softmax`) has `renormalize_logits` in
generation_config.json: its scores are over the continuations that exist. With excluded
rows that is over those that are left; to have them over all, as the model was trained,
use `ItemLogitsProcessor` and `renormalize_logits=False`.
"""

import json
import mmap
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Excluded = Sequence[Sequence[int]] | None


class ItemTrie:
    """The token sequences of all items, mapped from trie.csr.

    That file is in the format of safetensors, all arrays int64. The root is node 0,
    tokens[n] is the last token of node n, and its children are the nodes [child[n],
    child[n + 1]), whose tokens ascend.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent) -> None:
        with open(Path(folder) / "trie.csr", "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        data = view[8 + int.from_bytes(view[:8], "little") :]
        header = json.loads(bytes(view[8 : -len(data)]))
        array = {key: data[slice(*a["data_offsets"])].cast("q") for key, a in header.items()}
        # The last one is 1 where a token competes with the other continuations only.
        self.depth, self.padding, self.masked_softmax = array["depth_padding_masked_softmax"]
        self.child, self.tokens = array["child"], array["tokens"]
        # Rows of catalogue.parquet below node n: [first_row[n], last_row[n]).
        self.first_row, self.last_row = array["first_row"], array["last_row"]

    def node(self, generated: Sequence[int]) -> int:
        """The node that a sequence of tokens leads to, -1 where no item
        begins with it.
        """
        node = 0
        for token in generated:
            node = bisect_left(self.tokens, token, self.child[node], end := self.child[node + 1])
            if node == end or self.tokens[node] != token:
                return -1
        return node

    def allowed(self, generated: Sequence[int], excluded_rows: Sequence[int] = ()) -> list[int]:
        """Tokens that lead to an item which is not excluded; the padding token behind
        an item.
        """
        node = self.node(generated)
        first, end = self.child[node : node + 2] if node >= 0 else (0, 0)
        out = {row for row in excluded_rows if self.first_row[node] <= row < self.last_row[node]}
        counts = Counter(bisect_right(self.first_row, row, first, end) - 1 for row in out)
        exhausted = {n for n in counts if counts[n] == self.last_row[n] - self.first_row[n]}
        tokens = enumerate(self.tokens[first:end].tolist(), first)
        return [token for child, token in tokens if child not in exhausted] or [self.padding]

    def items(self, generated: Sequence[int]) -> range:
        """Rows of catalogue.parquet of a whole generated sequence; padding behind it is
        ignored.
        """
        while len(generated) and generated[-1] == self.padding and self.node(generated) < 0:
            generated = generated[:-1]
        node = self.node(generated)
        return range(self.first_row[node], self.last_row[node]) if node >= 0 else range(0)


def prefix_allowed_tokens_fn(
    trie: ItemTrie, prompt_length: int, excluded_rows: Excluded = None
) -> Callable[[int, Any], list[int]]:
    """The function for `generate` that allows the tokens of items.

    excluded_rows has, for every prompt, the rows of catalogue.parquet to leave out.
    """

    def allowed(prompt: int, tokens: Any) -> list[int]:
        excluded = excluded_rows[prompt] if excluded_rows is not None else ()
        return trie.allowed(tokens[prompt_length:].tolist(), excluded)

    return allowed


class ItemLogitsProcessor:
    """The same as one pass over the scores, for `generate(logits_processor=[...])`.

    With a masked softmax the scores are over all continuations, excluded ones too.
    """

    def __init__(
        self, trie: ItemTrie, prompt_length: int, num_beams: int = 1, excluded_rows: Excluded = None
    ) -> None:
        self.num_beams, self.masked_softmax = num_beams, trie.masked_softmax
        self.allowed = prefix_allowed_tokens_fn(trie, prompt_length, excluded_rows)
        self.continuations = prefix_allowed_tokens_fn(trie, prompt_length)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        masked = scores.new_full(scores.shape, float("-inf"))
        for row, tokens in enumerate(input_ids):
            allowed = self.allowed(row // self.num_beams, tokens)
            masked[row, allowed] = scores[row, allowed]
            if self.masked_softmax:
                masked[row] -= scores[row, self.continuations(row, tokens)].logsumexp(0)
        return masked
