"""Item vectors for quantisation: TF-IDF + SVD of titles and texts (no download) or a local model's, CF vectors, or both side by side."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, compress, islice, repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.config import ItemsConfig

AT_ONCE = 1 << 17  # texts, and vectors, that are held at once
FIT_DOCUMENTS = 1 << 20  # texts that TF-IDF + SVD are fitted on at most; more change little
FIT_CHARACTERS = 1 << 17  # where terms are of characters: each text has many times as many
CHARACTERS = 128  # of a text, that these are taken from
MAX_TERMS = 50_000
LEFT_OUT = 0.25  # of the texts, that words may leave without a term
NO_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff]"
)  # Thai, Lao, Burmese, Khmer, kana, Han


class Texts(Protocol):
    """Texts that are counted and gone through, as often as wanted."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]: ...


class Documents:
    """Title and text of every item as one string, in item-index order; gone through as often as wanted, never all in memory."""

    def __init__(self, dataset: InteractionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.num_items

    def __iter__(self) -> Iterator[str]:
        blank = repeat("", len(self))
        for title, text in zip(
            self.dataset.titles or blank, self.dataset.texts or blank, strict=True
        ):
            yield f"{title} {text}"


def item_documents(dataset: InteractionDataset) -> Documents | None:
    """The items' documents; None where the data set has neither titles nor texts."""
    return None if dataset.titles is None and dataset.texts is None else Documents(dataset)


def item_vectors(
    config: ItemsConfig,
    dataset: InteractionDataset,
    cf_embeddings: np.ndarray | None,
    scratch: Path,
) -> np.ndarray:
    """float32 [num_items, d], rows in item-index order, as `items.embedding` says: text, cf or text+cf. Mapped, of a file in the folder `scratch`.

    cf_embeddings: float [num_items, d'], by item index. Raises UserError when the texts or the CF vectors that are needed are missing.
    """
    parts = []
    kind = config.embedding
    if "text" in kind.split("+"):
        documents = item_documents(dataset)
        if documents is None:
            raise UserError(
                "items.embedding text: the data set has neither titles nor texts; give an item table (data.items_path), an items.index, or items.embedding: cf"
            )
        parts.append(
            text_vectors(
                documents, config.embedding_dim, config.seed, scratch, model=config.text_model
            )[0]
        )
    if "cf" in kind.split("+"):
        if cf_embeddings is None or len(cf_embeddings) != dataset.num_items:
            raise UserError(
                f"items.embedding {kind}: needs one CF vector for each of the {dataset.num_items} items; run `ilrec cf` first"
            )
        parts.append(np.asarray(cf_embeddings, np.float32))
    if len(parts) == 1:
        return parts[0]
    blocks = [slice(start, start + AT_ONCE) for start in range(0, dataset.num_items, AT_ONCE)]
    squares = [
        sum(float((part[block].astype(np.float64) ** 2).sum()) for block in blocks) / len(part)
        for part in parts
    ]
    joint = _mapped(scratch, dataset.num_items, sum(part.shape[1] for part in parts))
    for block in blocks:  # the same mean square length: neither side drowns the other
        joint[block] = np.hstack(
            [
                part[block] / np.float32(np.sqrt(square))
                for part, square in zip(parts, squares, strict=True)
            ]
        )
    return joint


def text_vectors(
    documents: Texts,
    dim: int,
    seed: int,
    scratch: Path,
    new: Sequence[str] = (),
    model: str | Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length vectors of texts: (float32 [n, d] of `documents`, mapped, of a file in `scratch`; float32 [m, d] of `new` in the same space).

    By the model in a folder (see load_text_model) or, without one, TF-IDF of words or characters (see _terms) + SVD, fitted on `documents` (on a seeded
    FIT_DOCUMENTS of them where they are more), where d is `dim`, or fewer where the documents have fewer terms. Deterministic for one seed.
    """
    if model is not None:
        embed = load_text_model(model)
        blocks = map(embed, _blocks(documents))
        first = next(blocks, embed([]))
        fitted, fresh = _mapped(scratch, len(documents), first.shape[1]), embed(list(new))
        _fill(fitted, chain([first], blocks))
        return fitted, fresh
    from sklearn.decomposition import TruncatedSVD

    few = len(documents) <= FIT_DOCUMENTS
    try:
        vectorizer, terms = _terms(
            lambda: iter(documents) if few else _sample(documents, seed),
            min_df=2 if len(documents) >= 50 else 1,
        )
    except ValueError:
        raise UserError(
            "items.embedding text: the titles and texts are blank; give an items.index, or items.embedding: cf"
        ) from None
    svd = TruncatedSVD(max(1, min(dim, min(terms.shape) - 1)), random_state=seed)
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # texts all alike: the variance that it divides by is 0
        of_fit = svd.fit_transform(terms)
    whole = terms.shape[0] == len(documents)
    fitted = _mapped(scratch, len(documents), of_fit.shape[1])
    _fill(
        fitted,
        [_unit(of_fit)]
        if whole
        else (_unit(svd.transform(vectorizer.transform(block))) for block in _blocks(documents)),
    )
    return fitted, _unit(svd.transform(vectorizer.transform(new))) if len(new) else np.zeros(
        (0, fitted.shape[1]), np.float32
    )


def _terms(texts: Callable[[], Iterator[str]], min_df: int) -> tuple[Any, Any]:
    """(TF-IDF fitted on the texts, its sparse matrix of them): of words that `min_df` texts have, or of one to three characters where words say little.

    That is where more than LEFT_OUT of the texts are in a script without blanks between words, or have none of these words, or where they all have but one.
    Blank texts do not count. Raises ValueError where there are no others.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    without_blanks = [NO_BLANKS.search(text) is not None for text in texts() if text.strip()]
    if sum(without_blanks) <= LEFT_OUT * len(without_blanks):
        words = TfidfVectorizer(
            sublinear_tf=True,
            stop_words="english",
            max_features=MAX_TERMS,
            min_df=min_df,
            dtype=np.float32,
        )
        with suppress(ValueError):  # no word at all
            terms = words.fit_transform(texts())
            if terms.shape[1] > 1 and np.count_nonzero(np.diff(terms.indptr)) >= (
                1 - LEFT_OUT
            ) * len(without_blanks):
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
    every = -(-len(without_blanks) // FIT_CHARACTERS)
    return characters, characters.fit_transform(
        islice(filter(str.strip, texts()), 0, None, every) if every > 1 else texts()
    )


def _beginning(text: str) -> str:
    return text[:CHARACTERS].lower()


def _sample(documents: Texts, seed: int) -> Iterator[str]:
    chosen = np.zeros(len(documents), bool)
    chosen[np.random.default_rng(seed).choice(len(documents), FIT_DOCUMENTS, replace=False)] = True
    return compress(documents, chosen)


def _blocks(documents: Texts) -> Iterator[list[str]]:
    remaining = iter(documents)
    while block := list(islice(remaining, AT_ONCE)):
        yield block


def _mapped(scratch: Path, rows: int, dim: int) -> np.ndarray:
    """A new float32 array of a file that has no name and is gone with the array: its memory is given back to disk when others need it."""
    if rows == 0:
        return np.zeros((0, dim), np.float32)
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.asarray(np.memmap(file, np.float32, "w+", shape=(rows, dim)))


def _fill(vectors: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
    start = 0
    for block in blocks:
        vectors[start : start + len(block)] = block
        start += len(block)


def load_text_model(
    folder: str | Path, batch: int = 64, max_tokens: int = 256
) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from n texts to unit-length float32 [n, hidden size], by a Hugging Face or sentence-embedding model in a local folder.

    The model is an encoder, a decoder, or the encoder of both.

    Texts are cut at `max_tokens`, or the fewer that the model takes. Pooled as the folder's 1_Pooling/config.json says (first, last or maximum over tokens),
    by the mean over tokens otherwise; a projection that some sentence-embedding models add after it is left out. Raises UserError when it does not load.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(folder)
    pooling = folder / "1_Pooling" / "config.json"
    if (
        folder / "0_Transformer" / "config.json"
    ).exists():  # where older sentence-embedding folders keep the model
        folder = folder / "0_Transformer"
    if not (folder / "config.json").exists():
        raise UserError(
            f"items.text_model: {folder} is not a model folder (no config.json); nothing is downloaded"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        names = (
            {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
            if tokenizer.vocab_files_names
            else set()
        )
        if names and not any(
            (folder / name).exists() for name in names
        ):  # an empty vocabulary would stand in for it
            raise OSError(f"no tokenizer (none of {', '.join(sorted(names))})")
        model, found = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        if found["mismatched_keys"]:  # left to itself the library points at a report
            name, stored, expected = min(found["mismatched_keys"])
            raise ValueError(
                f"the weights are of another model than config.json: {name} is {list(stored)}, expected {list(expected)}"
            )
        lacking = [
            name
            for name in sorted(found["missing_keys"])
            if "pooler" not in name and not name.startswith("decoder")
        ]  # what is not used
        if lacking:  # would be drawn at random
            raise ValueError(
                f"the weights are of another model than config.json: there is no {lacking[0]}"
            )
    except Exception as error:  # damaged files raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"items.text_model: {folder} does not load: {reason}") from None
    model = model.eval().float()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    modes = read_json_object(pooling) if pooling.exists() else {}
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    max_tokens = min(
        max_tokens,
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None) or max_tokens,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def embed(documents: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(documents), model.config.hidden_size), np.float32)
        order = sorted(
            range(len(documents)), key=lambda item: len(documents[item])
        )  # alike lengths together: little padding
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                tokens = tokenizer(
                    [documents[row] for row in rows],
                    padding=True,
                    truncation=True,
                    max_length=max_tokens,
                    return_tensors="pt",
                ).to(device)
                mask = tokens["attention_mask"]
                if (
                    mask.shape[1] == 0
                ):  # texts without a token, where the tokenizer adds none of its own: their vectors stay zero
                    continue
                hidden = model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
                if modes.get("pooling_mode_cls_token"):
                    pooled = hidden[:, 0]
                elif modes.get("pooling_mode_lasttoken"):
                    pooled = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
                elif modes.get("pooling_mode_max_tokens"):
                    pooled = hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
                else:
                    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(
                        min=1
                    )
                vectors[rows] = (
                    torch.where(mask.any(1, keepdim=True), pooled.float(), 0.0).cpu().numpy()
                )
        return _unit(vectors)

    return embed


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
