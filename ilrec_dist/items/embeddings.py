"""Item vectors for quantisation: TF-IDF + SVD of titles and texts (no download), CF vectors, or both side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ilrec_dist.data.prepared import Prepared
from ilrec_dist.errors import UserError


def item_vectors(kind: str, prepared: Prepared, dim: int, seed: int, cf_embeddings: np.ndarray | None) -> np.ndarray:
    """float32 [num_items, d], rows in item-index order, of kind "text", "cf" or "text+cf" (`items.embedding`).

    cf_embeddings: float [num_items, d'], by item index. Raises UserError when the texts or the CF vectors that the kind needs are missing.
    """
    parts = []
    if "text" in kind.split("+"):
        documents = item_documents(prepared)
        if documents is None:
            raise UserError(
                "items.embedding text: the data set has neither titles nor texts; give an item table (data.items_path), an items.index, or items.embedding: cf"
            )
        parts.append(text_vectors(documents, dim, seed)[0])
    if "cf" in kind.split("+"):
        if cf_embeddings is None or len(cf_embeddings) != prepared.num_items:
            raise UserError(f"items.embedding {kind}: needs one CF vector for each of the {prepared.num_items} items; run `ilrec cf` first")
        parts.append(np.ascontiguousarray(cf_embeddings, np.float32))
    if len(parts) == 1:
        return parts[0]
    return np.hstack([part / np.sqrt((part**2).sum(axis=1).mean()) for part in parts])  # the same mean square length: neither side drowns the other


def item_documents(prepared: Prepared) -> list[str] | None:
    """Title and text of every item as one string; None where the data set has neither."""
    if prepared.titles is None and prepared.texts is None:
        return None
    blank = [""] * prepared.num_items
    return [f"{title} {text}" for title, text in zip(prepared.titles or blank, prepared.texts or blank, strict=True)]


def text_vectors(documents: Sequence[str], dim: int, seed: int, new: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length TF-IDF + SVD vectors fitted on `documents`: (float32 [n, d] of them, float32 [m, d] of `new` in the same space).

    d is `dim`, or fewer where the documents have fewer terms. Deterministic for one seed.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", max_features=50_000, min_df=2 if len(documents) >= 50 else 1, dtype=np.float32)
    try:
        terms = vectorizer.fit_transform(documents)
    except ValueError:
        raise UserError("items.embedding text: the titles and texts hold no words; give an items.index, or items.embedding: cf") from None
    svd = TruncatedSVD(max(1, min(dim, min(terms.shape) - 1)), random_state=seed)
    fitted = _unit(svd.fit_transform(terms))
    return fitted, _unit(svd.transform(vectorizer.transform(new))) if len(new) else np.zeros((0, fitted.shape[1]), np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
