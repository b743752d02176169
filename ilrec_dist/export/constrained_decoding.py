"""Keeps `generate` of transformers on the items of this folder.

It needs numpy, and torch for the logits processor.

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

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class ItemTrie:
    """The token sequences of all items.

    Node n has the edges [indptr[n], indptr[n + 1]); the root is node 0.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent) -> None:
        arrays = np.load(Path(folder) / "trie.npz")
        self.indptr, self.tokens, self.children = (
            arrays[name] for name in ("indptr", "tokens", "children")
        )
        # Rows of catalogue.parquet below node n: [first_row[n], last_row[n]).
        self.first_row, self.last_row = arrays["first_row"], arrays["last_row"]
        self.depth, self.padding = int(arrays["depth"]), int(arrays["padding"])
        # Whether a token competes with the other continuations only.
        self.masked_softmax = bool(arrays["masked_softmax"])

    def node(self, generated: Sequence[int]) -> int:
        """The node that a sequence of tokens leads to, -1 where no item
        begins with it.
        """
        node = 0
        for token in generated:
            begin, end = self.indptr[node], self.indptr[node + 1]
            edge = begin + int(np.searchsorted(self.tokens[begin:end], token))
            if edge == end or self.tokens[edge] != token:
                return -1
            node = int(self.children[edge])
        return node

    def allowed(self, generated: Sequence[int], excluded_rows: Sequence[int] = ()) -> list[int]:
        """Tokens that lead to an item which is not excluded; the padding token behind
        an item.
        """
        node = self.node(generated)
        edges = slice(self.indptr[node], self.indptr[node + 1]) if node >= 0 else slice(0, 0)
        children = self.children[edges]
        if len(children) == 0:
            return [self.padding]
        out = np.sort(np.asarray(excluded_rows, dtype=np.int64))
        first, last = self.first_row[children], self.last_row[children]
        left = last - first - (np.searchsorted(out, last) - np.searchsorted(out, first))
        tokens: list[int] = self.tokens[edges][left > 0].tolist()
        return tokens or [self.padding]

    def items(self, generated: Sequence[int]) -> range:
        """Rows of catalogue.parquet of a whole generated sequence; padding behind it is
        ignored.
        """
        length = len(generated)
        while (
            length and generated[length - 1] == self.padding and self.node(generated[:length]) < 0
        ):
            length -= 1
        node = self.node(generated[:length])
        return range(int(self.first_row[node]), int(self.last_row[node])) if node >= 0 else range(0)


def prefix_allowed_tokens_fn(
    trie: ItemTrie, prompt_length: int, excluded_rows: Sequence[Sequence[int]] | None = None
) -> Callable[[int, Any], list[int]]:
    """The function for `generate` that allows the tokens of items.

    excluded_rows has, for every prompt, the rows of catalogue.parquet to leave out.
    """

    def allowed(batch: int, tokens: Any) -> list[int]:
        excluded = excluded_rows[batch] if excluded_rows is not None else ()
        return trie.allowed(tokens[prompt_length:].tolist(), excluded)

    return allowed


class ItemLogitsProcessor:
    """The same as one pass over the scores, for `generate(logits_processor=[...])`.

    With a masked softmax the scores are over all continuations, excluded ones too.
    """

    def __init__(
        self,
        trie: ItemTrie,
        prompt_length: int,
        num_beams: int = 1,
        excluded_rows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.trie, self.prompt_length, self.num_beams = trie, prompt_length, num_beams
        self.excluded_rows = excluded_rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        masked = scores.new_full(scores.shape, float("-inf"))
        for row, tokens in enumerate(input_ids):
            generated = tokens[self.prompt_length :].tolist()
            excluded = self.excluded_rows[row // self.num_beams] if self.excluded_rows else ()
            allowed = self.trie.allowed(generated, excluded)
            masked[row, allowed] = scores[row, allowed]
            if self.trie.masked_softmax:
                masked[row] -= scores[row, self.trie.allowed(generated)].logsumexp(0)
        return masked
