"""The configuration section `items`: how an item becomes a token sequence."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from annotated_types import Ge, Interval

from ilrec_dist.common.config_fields import Int, NonNegative, Positive, section


@section
class ItemsConfig:
    """Items → token sequences: codes that are given or built, titles, or one token each.

    With `index` the codes of a file are read; without, they are built by residual
    quantisation.
    """

    # `semantic`: a tuple of codes. `titles`: the pieces of the title and an end token. `atomic`:
    # one token per item.
    form: Literal["semantic", "titles", "atomic"] = "semantic"
    # A NAME.index.json with the code tokens of every item.
    index: Optional[str] = None
    # The vectors that residual quantisation sees: TF-IDF + SVD of the texts (or `text_model`),
    # SASRec's item vectors, or both side by side.
    embedding: Literal["text", "cf", "text+cf"] = "text"
    # The folder of a Hugging Face or sentence-embedding model; null: TF-IDF + SVD.
    text_model: Optional[str] = None
    # Dimensions of the SVD.
    embedding_dim: Positive = 64
    levels: Annotated[Int, Interval(ge=1, le=8)] = 3
    codes_per_level: Annotated[Int, Interval(ge=2, le=65536)] = 256
    # Titles: a tokenizer.json; null: byte-pair encoding learned from the titles.
    tokenizer: Optional[str] = None
    # Titles: tokens that are learned, at most. The 256 bytes are among them.
    title_vocab_size: Annotated[Int, Ge(512)] = 8192
    # Titles: longer ones are cut at so many tokens.
    title_tokens: Annotated[Int, Interval(ge=1, le=256)] = 32
    # What happens to items that share a token sequence.
    collisions: Literal["keep", "refuse", "resolve"] = "keep"
    seed: NonNegative = 0

    @property
    def from_cf(self) -> bool:
        """Whether codes are built from the CF model's vectors, so that the CF stage comes first."""
        return self.index is None and self.form == "semantic" and "cf" in self.embedding
