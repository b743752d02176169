"""Texts as vectors by a Hugging Face or sentence-embedding model in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.items.tfidf import unit_rows

MAX_TOKENS = 256


class TextModel:
    """An encoder, a decoder, or the encoder of both, whose token states are pooled per
    text.

    Texts are cut at MAX_TOKENS, or the fewer that the model takes. They are pooled as
    the folder's 1_Pooling/config.json says (first, last or maximum over tokens), by the
    mean over tokens otherwise; a projection that some sentence-embedding models add
    after it is left out. Nothing is downloaded. Raises UserError when the folder does
    not load.
    """

    def __init__(self, folder: str | Path, batch_size: int = 64) -> None:
        folder, self._batch_size = Path(folder), batch_size
        pooling = folder / "1_Pooling" / "config.json"
        # Older sentence-embedding folders keep the model in a folder of its own.
        if (folder / "0_Transformer" / "config.json").exists():
            folder = folder / "0_Transformer"
        if not (folder / "config.json").exists():
            raise UserError(
                f"items.text_model: {folder} is not a model folder (no config.json); "
                "nothing is downloaded"
            )
        try:
            self._tokenizer, model = _load_tokenizer(folder), _load_model(folder)
        # Damaged files raise all kinds of errors.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"items.text_model: {folder} does not load: {reason}") from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().float()
        if self._model.config.is_encoder_decoder:
            self._model = self._model.get_encoder()
        self._model.to(self._device)
        self._pooling = read_json_object(pooling) if pooling.exists() else {}
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        positions = getattr(self._model.config, "max_position_embeddings", None) or MAX_TOKENS
        self._max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length, positions)
        self.dim = int(self._model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length vectors float32 [n, dim] of n texts.

        A text without a token, where the tokenizer adds none itself, has a vector of
        zeros.
        """
        vectors = np.zeros((len(texts), self.dim), np.float32)
        # Texts of like lengths are batched together: they need little padding.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            tokens = self._tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(self._device)
            mask = tokens["attention_mask"]
            if mask.shape[1] == 0:
                continue
            hidden = self._model(
                input_ids=tokens["input_ids"], attention_mask=mask
            ).last_hidden_state
            pooled = torch.where(mask.any(1, keepdim=True), self._pool(hidden, mask).float(), 0.0)
            vectors[rows] = pooled.cpu().numpy()
        return unit_rows(vectors)

    def _pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._pooling.get("pooling_mode_cls_token"):
            return hidden[:, 0]
        if self._pooling.get("pooling_mode_lasttoken"):
            return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
        if self._pooling.get("pooling_mode_max_tokens"):
            return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def embed_texts(folder: str, texts: Sequence[str]) -> np.ndarray:
    """`TextModel(folder).embed(texts)`; a process loads the model once."""
    return _loaded(folder).embed(texts)


@lru_cache(maxsize=1)
def _loaded(folder: str) -> TextModel:
    return TextModel(folder)


def _load_tokenizer(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    names = (
        {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
        if tokenizer.vocab_files_names
        else set()
    )
    # Without these files an empty vocabulary would stand in for the tokenizer's.
    if names and not any((folder / name).exists() for name in names):
        raise OSError(f"no tokenizer (none of {', '.join(sorted(names))})")
    return tokenizer


def _load_model(folder: Path) -> Any:
    model, loading_info = AutoModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # Left to itself the library points at a report that it does not print.
    if loading_info["mismatched_keys"]:
        name, stored, expected = min(loading_info["mismatched_keys"])
        raise ValueError(
            "the weights are of another model than config.json: "
            f"{name} is {list(stored)}, expected {list(expected)}"
        )
    # The library would draw what is missing at random; poolers and decoders are not used.
    lacking = [
        name
        for name in sorted(loading_info["missing_keys"])
        if "pooler" not in name and not name.startswith("decoder")
    ]
    if lacking:
        raise ValueError(
            f"the weights are of another model than config.json: there is no {lacking[0]}"
        )
    return model
