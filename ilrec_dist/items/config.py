"""The configuration section `items`: how an item becomes a token sequence."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from annotated_types import Ge, Interval

from ilrec_dist.common.config_fields import Affects, Int, NonNegative, OnlyIf, Positive, section


def _builds_codes(config: Any) -> bool:
    return bool(config.items.form == "semantic" and config.items.index is None)


def _needs_vectors(config: Any) -> bool:
    resolves = config.items.index is not None and config.items.collisions == "resolve"
    return _builds_codes(config) or resolves


def _embeds_texts(config: Any) -> bool:
    return _needs_vectors(config) and "text" in config.items.embedding


def _embeds_by_tfidf(config: Any) -> bool:
    return _embeds_texts(config) and config.items.text_model is None


def _draws_numbers(config: Any) -> bool:
    """Quantisation draws the points that it begins with, TF-IDF + SVD a projection."""
    return _builds_codes(config) or _embeds_by_tfidf(config)


def _may_collide(config: Any) -> bool:
    return bool(config.items.form != "atomic")


def _are_titles(config: Any) -> bool:
    return bool(config.items.form == "titles")


def _have_own_pieces(config: Any) -> bool:
    return _are_titles(config) and config.backbone.from_ is None


def _learns_pieces(config: Any) -> bool:
    return _have_own_pieces(config) and config.items.tokenizer is None


_CODES_OF_VECTORS = (
    "codes that are built or resolved: items.form semantic, and no items.index "
    "unless items.collisions is resolve"
)


@section(affects="index")
class ItemsConfig:
    """Items → token sequences: codes that are
    given or built, titles, or one token each.

    With `index` the codes of a file are read; without, they are built by residual
    quantisation.
    """

    # `semantic`: a tuple of codes. `titles`: the pieces of the title and an end token. `atomic`:
    # one token per item.
    form: Literal["semantic", "titles", "atomic"] = "semantic"
    # A NAME.index.json with the code tokens of every item.
    index: Annotated[Optional[str], Affects()] = None
    # The vectors that residual quantisation sees: TF-IDF + SVD of the texts (or `text_model`),
    # SASRec's item vectors, or both side by side.
    embedding: Annotated[
        Literal["text", "cf", "text+cf"],
        OnlyIf("items.form semantic without items.index", _builds_codes),
    ] = "text"
    # The folder of a Hugging Face or sentence-embedding model; null: TF-IDF + SVD.
    text_model: Annotated[
        Optional[str],
        Affects(),
        OnlyIf(_CODES_OF_VECTORS, _needs_vectors),
        OnlyIf("items.embedding text or text+cf", _embeds_texts),
    ] = None
    # Dimensions of the SVD.
    embedding_dim: Annotated[
        Positive,
        OnlyIf(_CODES_OF_VECTORS, _needs_vectors),
        OnlyIf("items.embedding text or text+cf without items.text_model", _embeds_by_tfidf),
    ] = 64
    levels: Annotated[
        Int, Interval(ge=1, le=8), OnlyIf("items.form semantic without items.index", _builds_codes)
    ] = 3
    codes_per_level: Annotated[
        Int,
        Interval(ge=2, le=65536),
        OnlyIf("items.form semantic without items.index", _builds_codes),
    ] = 256
    # Titles: a tokenizer.json; null: byte-pair encoding learned from the titles.
    # With a model in backbone.from its own tokenizer spells them.
    tokenizer: Annotated[
        Optional[str],
        Affects(),
        OnlyIf("items.form titles with backbone.from null", _have_own_pieces),
    ] = None
    # Titles: tokens that are learned, at most. The 256 bytes are among them.
    title_vocab_size: Annotated[
        Int,
        Ge(512),
        OnlyIf("items.form titles with backbone.from and items.tokenizer null", _learns_pieces),
    ] = 8192
    # Titles: longer ones are cut at so many tokens.
    title_tokens: Annotated[
        Int, Interval(ge=1, le=256), OnlyIf("items.form titles", _are_titles)
    ] = 32
    # What happens to items that share a token sequence.
    collisions: Annotated[
        Literal["keep", "refuse", "resolve"],
        OnlyIf("items.form semantic or titles", _may_collide),
    ] = "keep"
    # Of the quantisation and of the SVD.
    seed: Annotated[
        NonNegative,
        OnlyIf(_CODES_OF_VECTORS, _needs_vectors),
        OnlyIf(
            "codes that are built, or resolved without items.text_model, whose vectors take no "
            "random number",
            _draws_numbers,
        ),
    ] = 0

    @property
    def from_cf(self) -> bool:
        """Whether codes are built from the CF model's
        vectors, so that the CF stage comes first.
        """
        return self.index is None and self.form == "semantic" and "cf" in self.embedding

    @property
    def from_texts(self) -> bool:
        """Whether the texts of the items that have some become vectors."""
        builds = self.index is None and "text" in self.embedding
        return self.form == "semantic" and (builds or self.collisions == "resolve")
