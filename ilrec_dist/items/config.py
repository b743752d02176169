"""The configuration section `items`: how an item becomes a token sequence."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from annotated_types import Ge, Interval

from ilrec_dist.common.config_fields import Int, NonNegative, Positive, section


@section
class ItemsConfig:
    """Items → token sequences. With `index` the given codes are read; without, they are built by residual quantisation. Or titles, or a token each."""

    form: Literal["semantic", "titles", "atomic"] = (
        "semantic"  # titles: byte-pair pieces and an end token; atomic: one token per item
    )
    index: Optional[str] = None  # a NAME.index.json
    embedding: Literal["text", "cf", "text+cf"] = (
        "text"  # what residual quantisation sees: TF-IDF + SVD of the texts, SASRec's item vectors, or both
    )
    text_model: Optional[str] = (
        None  # folder of a Hugging Face or sentence-embedding model; null: TF-IDF + SVD
    )
    embedding_dim: Positive = 64  # of the SVD
    levels: Annotated[Int, Interval(ge=1, le=8)] = 3
    codes_per_level: Annotated[Int, Interval(ge=2, le=65536)] = 256
    tokenizer: Optional[str] = (
        None  # titles: a tokenizer.json; null: byte-pair encoding learned from the titles
    )
    title_vocab_size: Annotated[Int, Ge(512)] = (
        8192  # titles: tokens that are learned, at most; the 256 bytes are among them
    )
    title_tokens: Annotated[Int, Interval(ge=1, le=256)] = 32  # titles: longer ones are cut
    collisions: Literal["keep", "refuse", "resolve"] = "keep"  # items that share a token sequence
    seed: NonNegative = 0

    @property
    def from_cf(self) -> bool:
        """Whether the codes are built from the CF model's item vectors, so that the CF stage comes first."""
        return self.index is None and self.form == "semantic" and "cf" in self.embedding
