"""Item vectors for quantisation: of titles and texts, of the CF model, or both side by
side.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ilrec_dist.common.disk import writing_to
from ilrec_dist.common.errors import UserError
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.spread import Embed, Spread, spread_over
from ilrec_dist.reporting.progress import stage_progress

if TYPE_CHECKING:
    from ilrec_dist.items.tfidf import Texts

# Texts, and vectors, that are in memory at once.
CHUNK_ROWS = 1 << 17


class Documents:
    """Title and text of every item as one string, in item-index order.

    They can be gone through as often as wanted and are never all in memory.
    """

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


def quantizer_vectors(
    config: ItemsConfig,
    dataset: InteractionDataset,
    cf_embeddings: np.ndarray | None,
    scratch: Path,
    spread: Spread | None = None,
) -> np.ndarray:
    """float32 [num_items, d] by item index, as `items.embedding` says: text, cf or
    text+cf.

    cf_embeddings: float [num_items, d'] by item index. The array is mapped, of a file
    in the folder `scratch`. Raises UserError when texts or CF vectors that are needed
    are missing, and for a vector that is not finite.
    """
    parts = []
    kinds = config.embedding.split("+")
    if "text" in kinds:
        documents = item_documents(dataset)
        if documents is None:
            raise UserError(
                f"items.embedding {config.embedding}: none of the {dataset.num_items} items has a "
                f"title or text (the first is {dataset.item_ids[0]!r}); give them in an item table "
                "(data.items_path), or set items.index, items.embedding: cf or items.form: atomic"
            )
        parts.append(document_vectors(config, documents, dataset.item_ids, scratch, spread))
    if "cf" in kinds:
        if cf_embeddings is None or len(cf_embeddings) != dataset.num_items:
            raise UserError(
                f"items.embedding {config.embedding}: needs one CF vector for each of the "
                f"{dataset.num_items} items; run `ilrec cf` first"
            )
        parts.append(check_cf_vectors(cf_embeddings, dataset.item_ids))
    return parts[0] if len(parts) == 1 else _side_by_side(parts, scratch)


def document_vectors(
    config: ItemsConfig,
    documents: Texts,
    item_ids: Sequence[str],
    scratch: Path,
    spread: Spread | None = None,
) -> np.ndarray:
    """`text_vectors` of the items' documents, all of them finite."""
    vectors, _ = text_vectors(
        documents,
        config.embedding_dim,
        config.seed,
        scratch,
        model=config.text_model,
        spread=spread,
    )
    source = f"items.text_model: {config.text_model}" if config.text_model else "items.embedding"
    check_finite(vectors, item_ids, source, "mend its title and text, or the model")
    return vectors


def check_cf_vectors(vectors: np.ndarray, item_ids: Sequence[str]) -> np.ndarray:
    """The CF model's item vectors as float32, all of them finite."""
    with np.errstate(over="ignore"):
        vectors = np.asarray(vectors, np.float32)
    check_finite(
        vectors,
        item_ids,
        "the CF model",
        "its training has diverged; lower cf.learning_rate and run `ilrec cf` again",
    )
    return vectors


def check_finite(vectors: np.ndarray, item_ids: Sequence[str], source: str, advice: str) -> None:
    """Raise UserError that names the first item whose vector has a NaN or
    an infinity.
    """
    for start in range(0, len(vectors), CHUNK_ROWS):
        finite = np.isfinite(vectors[start : start + CHUNK_ROWS]).all(axis=1)
        if not finite.all():
            item = item_ids[start + int(finite.argmin())]
            raise UserError(f"{source}: the vector of item {item!r} is not finite; {advice}")


def _side_by_side(parts: list[np.ndarray], scratch: Path) -> np.ndarray:
    """Vectors of several kinds with the same mean square length: neither drowns the
    other.
    """
    rows = len(parts[0])
    blocks = [slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS)]
    squares = [
        sum(float((part[block].astype(np.float64) ** 2).sum()) for block in blocks) / rows
        for part in parts
    ]
    joint = _mapped(scratch, rows, sum(part.shape[1] for part in parts))
    for block in blocks:
        joint[block] = np.hstack(
            [
                part[block] / np.float32(np.sqrt(square or 1.0))
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
    spread: Spread | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length vectors of texts, by the model in a folder or by TF-IDF + SVD.

    Returns (float32 [n, d] of `documents`, mapped, of a file in `scratch`; float32 [m,
    d] of `new` in the same space). TF-IDF + SVD has `dim` dimensions at most and is
    fitted on `documents` (see TfidfSpace). Deterministic for one seed, and the same
    whoever computes them: this process, or those of `spread`. Raises UserError when the
    documents are blank or the model does not load, NotWritable where the file has no
    room.
    """
    if model is not None:
        # torch and transformers take seconds to load, and only this needs them.
        from ilrec_dist.items.text_model import TextModel, embed_texts

        text_model = TextModel(model)
        vectors = _mapped(scratch, len(documents), text_model.dim)
        # Others load the model themselves.
        elsewhere = partial(embed_texts, str(Path(model).absolute()))
        embed = text_model.embed if spread is None else elsewhere
        embed_documents(embed, documents, vectors, spread)
        return vectors, text_model.embed(list(new))
    # scikit-learn takes a second to load, and only this needs it.
    from ilrec_dist.items.tfidf import TfidfSpace

    try:
        space = TfidfSpace(documents, dim, seed)
    except ValueError:
        raise UserError(
            "items.embedding text: the titles and texts are blank; give an items.index, or "
            "items.embedding: cf"
        ) from None
    vectors = _mapped(scratch, len(documents), space.dim)
    if space.fitted is not None:
        vectors[:] = space.fitted
    else:
        embed_documents(space.embed, documents, vectors, spread)
    return vectors, space.embed(new)


def embed_documents(
    embed: Embed, documents: Texts, vectors: np.ndarray, spread: Spread | None = None
) -> None:
    """Fill float32 `vectors` [n, d] with those of n documents, a block at a time or by
    the workers of `spread`.
    """
    if spread is None:
        _fill(vectors, map(embed, _blocks(documents)))
        return
    with (
        spread.start(embed) as workers,
        stage_progress("index", len(documents), "texts") as progress,
    ):
        for rows, piece in spread_over(workers, _pieces(documents, spread.texts)):
            vectors[rows] = piece
            progress.advance(len(rows))


def _blocks(documents: Texts) -> Iterator[list[str]]:
    remaining = iter(documents)
    while block := list(islice(remaining, CHUNK_ROWS)):
        yield block


def _pieces(documents: Texts, size: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """(rows, texts) of all documents, `size` at a time: in each block by length, as the
    text model batches them.
    """
    start = 0
    for block in _blocks(documents):
        order = sorted(range(len(block)), key=lambda row: len(block[row]))
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            yield start + np.array(rows), [block[row] for row in rows]
        start += len(block)


def _mapped(scratch: Path, rows: int, dim: int) -> np.ndarray:
    """A new float32 array of a file that has no name and is gone with the array.

    Its memory is given back to the disk when others need it. Raises NotWritable where
    there is no room for it.
    """
    if rows == 0:
        return np.zeros((0, dim), np.float32)
    with writing_to(scratch), tempfile.TemporaryFile(dir=scratch) as file:
        # A mapped page for which the disk has no room would end the process.
        os.posix_fallocate(file.fileno(), 0, 4 * rows * dim)
        return np.asarray(np.memmap(file, np.float32, "w+", shape=(rows, dim)))


def _fill(vectors: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
    start = 0
    for block in blocks:
        vectors[start : start + len(block)] = block
        start += len(block)
