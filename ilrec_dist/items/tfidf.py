"""Texts as vectors without any download: TF-IDF of words or characters, then a
truncated SVD.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import compress, islice
from typing import Any, Protocol

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

# Texts that are fitted on, at most; more change little.
FIT_DOCUMENTS = 1 << 20
# The same where terms are of characters: each text has many times as many.
FIT_CHARACTERS = 1 << 17
# Characters at the beginning of a text that such terms are taken from.
CHARACTERS = 128
MAX_TERMS = 50_000
# The share of the texts that words may leave without a term.
LEFT_OUT = 0.25
# Thai, Lao, Burmese, Khmer, kana, Han: scripts without blanks between words.
NO_BLANKS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff]")


class Texts(Protocol):
    """Texts that are counted and gone through, as often as wanted."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


class TfidfSpace:
    """A vector space fitted on texts: on all, or on a seeded FIT_DOCUMENTS of them.

    It has `dim` dimensions, or fewer where the texts have fewer terms. Deterministic
    for one seed. Raises ValueError where all texts are blank.
    """

    def __init__(self, texts: Texts, dim: int, seed: int) -> None:
        whole = len(texts) <= FIT_DOCUMENTS
        self._vectorizer, terms = fit_terms(
            lambda: iter(texts) if whole else _sample(texts, seed),
            min_df=2 if len(texts) >= 50 else 1,
        )
        self._svd = TruncatedSVD(max(1, min(dim, min(terms.shape) - 1)), random_state=seed)
        # Where all texts are alike, the variance that scikit-learn divides by is 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            fitted = self._svd.fit_transform(terms)
        self.dim = int(fitted.shape[1])
        # The vectors of all texts, where all were fitted on.
        self.fitted = unit_rows(fitted) if terms.shape[0] == len(texts) else None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length vectors float32 [n, dim] of n texts; zeros for a text without
        known terms.
        """
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        return unit_rows(self._svd.transform(self._vectorizer.transform(texts)))


def fit_terms(texts: Callable[[], Iterator[str]], min_df: int) -> tuple[Any, Any]:
    """(TF-IDF fitted on the texts, its sparse matrix of them).

    The terms are words that `min_df` texts have, or one to three characters where words
    say little. That is where more than LEFT_OUT of the texts are in a script without
    blanks between words, or have none of these words, or where they all have but one.
    Blank texts do not count. Raises ValueError where there are no others.
    """
    without_blanks = [NO_BLANKS.search(text) is not None for text in texts() if text.strip()]
    if sum(without_blanks) <= LEFT_OUT * len(without_blanks):
        words = TfidfVectorizer(
            sublinear_tf=True,
            stop_words="english",
            max_features=MAX_TERMS,
            min_df=min_df,
            dtype=np.float32,
        )
        # scikit-learn raises ValueError where there is no word at all.
        with suppress(ValueError):
            terms = words.fit_transform(texts())
            texts_with_terms = np.count_nonzero(np.diff(terms.indptr))
            if terms.shape[1] > 1 and texts_with_terms >= (1 - LEFT_OUT) * len(without_blanks):
                return words, terms
    characters = TfidfVectorizer(
        sublinear_tf=True,
        analyzer="char_wb",
        preprocessor=_beginning,
        ngram_range=(1, 3),
        max_features=MAX_TERMS,
        min_df=min_df,
        dtype=np.float32,
    )
    stride = -(-len(without_blanks) // FIT_CHARACTERS)
    fitted_on = islice(filter(str.strip, texts()), 0, None, stride) if stride > 1 else texts()
    return characters, characters.fit_transform(fitted_on)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """float32 rows of unit length; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((vectors / np.maximum(lengths, 1e-12)).astype(np.float32))


def _beginning(text: str) -> str:
    return text[:CHARACTERS].lower()


def _sample(texts: Texts, seed: int) -> Iterator[str]:
    chosen = np.zeros(len(texts), bool)
    chosen[np.random.default_rng(seed).choice(len(texts), FIT_DOCUMENTS, replace=False)] = True
    return compress(texts, chosen)
