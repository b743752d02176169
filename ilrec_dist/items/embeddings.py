"""Item vectors for quantisation: TF-IDF + SVD of titles and texts (no download) or a local model's, CF vectors, or both side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilrec_dist.config import ItemsConfig
from ilrec_dist.data.files import read_json_object
from ilrec_dist.data.prepared import Prepared
from ilrec_dist.errors import UserError


def item_vectors(config: ItemsConfig, prepared: Prepared, cf_embeddings: np.ndarray | None) -> np.ndarray:
    """float32 [num_items, d], rows in item-index order, as `items.embedding` says: text, cf or text+cf.

    cf_embeddings: float [num_items, d'], by item index. Raises UserError when the texts or the CF vectors that are needed are missing.
    """
    parts = []
    kind = config.embedding
    if "text" in kind.split("+"):
        documents = item_documents(prepared)
        if documents is None:
            raise UserError(
                "items.embedding text: the data set has neither titles nor texts; give an item table (data.items_path), an items.index, or items.embedding: cf"
            )
        parts.append(text_vectors(documents, config.embedding_dim, config.seed, model=config.text_model)[0])
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


def text_vectors(documents: Sequence[str], dim: int, seed: int, new: Sequence[str] = (), model: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length vectors of texts: (float32 [n, d] of `documents`, float32 [m, d] of `new` in the same space).

    By the model in a folder (see model_vectors) or, without one, TF-IDF + SVD fitted on `documents`, where d is `dim`, or fewer where the documents have
    fewer terms. Deterministic for one seed.
    """
    if model is not None:
        fitted = model_vectors(documents, model)
        return fitted, model_vectors(new, model) if len(new) else fitted[:0]
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


def model_vectors(documents: Sequence[str], folder: str | Path, batch: int = 64, max_tokens: int = 256) -> np.ndarray:
    """Unit-length float32 [n, hidden size] by a Hugging Face or sentence-embedding model in a local folder: encoder, decoder, or the encoder of both.

    Texts are cut at `max_tokens`, or the fewer that the model takes. Pooled as the folder's 1_Pooling/config.json says (first, last or maximum over tokens),
    by the mean over tokens otherwise; a projection that some sentence-embedding models add after it is left out. Raises UserError when it does not load.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(folder)
    pooling = folder / "1_Pooling" / "config.json"
    if (folder / "0_Transformer" / "config.json").exists():  # where older sentence-embedding folders keep the model
        folder = folder / "0_Transformer"
    if not (folder / "config.json").exists():
        raise UserError(f"items.text_model: {folder} is not a model folder (no config.json); nothing is downloaded")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
    except (OSError, ValueError) as error:
        raise UserError(f"items.text_model: {folder} does not load: {str(error).splitlines()[0]}") from None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    modes = read_json_object(pooling) if pooling.exists() else {}
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    max_tokens = min(max_tokens, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or max_tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    vectors = np.zeros((len(documents), model.config.hidden_size), np.float32)
    order = sorted(range(len(documents)), key=lambda item: len(documents[item]))  # alike lengths together: little padding
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            tokens = tokenizer([documents[row] for row in rows], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
            mask = tokens["attention_mask"]
            if mask.shape[1] == 0:  # texts without a token, where the tokenizer adds none of its own: their vectors stay zero
                continue
            hidden = model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
            if modes.get("pooling_mode_cls_token"):
                pooled = hidden[:, 0]
            elif modes.get("pooling_mode_lasttoken"):
                pooled = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
            elif modes.get("pooling_mode_max_tokens"):
                pooled = hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
            else:
                pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            vectors[rows] = torch.where(mask.any(1, keepdim=True), pooled.float(), 0.0).cpu().numpy()
    return _unit(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
