"""`ilrec index add`: codes for new items without changing an old one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder
from ilrec_dist.common.manifest import manifest_hashes, verified
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.build import ATOMIC, write_items
from ilrec_dist.items.catalogue import REPAIR, Catalogue, make_catalogue, make_title_catalogue
from ilrec_dist.items.collisions import (
    collision_report,
    known_distances,
    squared_distances,
    tuple_groups,
)
from ilrec_dist.items.index_report import catalogue_report, collision_warning, read_report
from ilrec_dist.items.language_model import LANGUAGE_MODEL, extend_tokenizer
from ilrec_dist.items.lcrec_index import INDEX, stored_ids
from ilrec_dist.items.residual_quantizer import CODEBOOKS, Codebooks, centroid_codebooks
from ilrec_dist.items.spread import local_spread
from ilrec_dist.items.text_embeddings import check_finite, item_documents, text_vectors
from ilrec_dist.items.titles import TOKENIZER, load_tokenizer, spell

# Old vectors are compared with the codes on a sample, in the order given and in random ones.
ORDER_SAMPLE, RANDOM_ORDERS = 8192, 99


@dataclass(frozen=True)
class GivenVectors:
    """Vectors for `index add` in place of texts.

    Without `old` the new vectors are of the kind that the index was built from, and its
    own codebooks are used. With `old`, by item index, both are of any one kind.
    """

    new: np.ndarray  # float [m, d]
    old: np.ndarray | None = None  # float [num_items, d]


def add_items(
    folder: str | Path,
    dataset: InteractionDataset,
    new_ids: Sequence[str],
    out: str | Path,
    new_documents: Sequence[str] | None = None,
    new_titles: Sequence[str] | None = None,
    vectors: GivenVectors | None = None,
) -> dict[str, Any]:
    """Extend the catalogue in `folder` by new items; write the longer one to `out`.

    New items get the item indices that follow the old ones, in the order given. Each
    takes the nearest code at every level but the last, and at the last the nearest code
    that no item of its prefix holds; new items of one prefix share its free codes out
    at the least total distance. Nearest is by the codebooks that the codes were built
    with, or, for codes that were given, by the means of the old items' vectors.

    Vectors are of `new_documents`, one text each, embedded with the old items' texts,
    or `vectors`. Where an item is one token (items.form atomic) there is nothing to be
    near to: new items take the next tokens. Where it is its title, `new_titles` are
    spelt in the old pieces.

    Returns the report. Raises UserError for an index of other items than `dataset`
    holds, an id that is already there, texts or vectors that are missing or do not fit,
    and a prefix with no code left.
    """
    old = Catalogue.load(folder)
    # Nothing is made before all is well.
    scratch = next(
        path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists()
    )
    if not scratch.is_dir():
        raise UserError(f"index add: {scratch} is a file, expected a folder (--out {out})")
    old_ids = list(stored_ids(folder, dataset.item_ids))
    known = set(old_ids)
    for item in new_ids:
        if item in known:
            raise UserError(
                f"index add: item {item!r} is in {Path(folder) / INDEX} already; leave it out"
            )
        known.add(item)
    before, blank = read_report(folder), []
    if old.pieces is not None:
        catalogue = _with_titles(folder, old, new_ids, new_titles, before["title_tokens"])
    elif old.level_names == (ATOMIC,):
        catalogue = _with_tokens(old, len(new_ids))
    else:
        books, new_vectors = _books_and_vectors(
            folder, dataset, old, new_ids, new_documents, vectors, scratch
        )
        if vectors is None:
            texts = zip(new_ids, new_documents or (), strict=True)
            blank = [item for item, text in texts if not text.strip()]
        codes = np.vstack([old.codes(), _assign(new_vectors, books, old, new_ids)])
        catalogue = make_catalogue(codes, old.level_sizes, old.level_names, old.vocabulary)
    report = {
        **before,
        **catalogue_report(catalogue),
        "added": len(new_ids),
        "added_without_text": len(blank),
        "collisions": {**before["collisions"], "after": collision_report(catalogue.codes())},
    }
    report["warning"] = collision_warning(report)
    with committed_folder(out) as work:
        for name in manifest_hashes(folder, REPAIR):
            if name in (TOKENIZER, CODEBOOKS) or name.startswith(f"{LANGUAGE_MODEL}/"):
                (work / name).parent.mkdir(exist_ok=True)
                shutil.copy(verified(folder, name, REPAIR), work / name)
        if (work / LANGUAGE_MODEL).is_dir():
            extend_tokenizer(work / LANGUAGE_MODEL, new_token_texts(old, catalogue))
        write_items(work, catalogue, [*old_ids, *new_ids], report)
    return report


def new_token_texts(old: Catalogue, new: Catalogue) -> dict[int, str]:
    """Token id → name of the item tokens that only the longer catalogue has."""
    before = old.token_names()
    return {token: name for token, name in new.token_names().items() if token not in before}


def _with_titles(
    folder: str | Path,
    old: Catalogue,
    new_ids: Sequence[str],
    new_titles: Sequence[str] | None,
    title_tokens: int,
) -> Catalogue:
    assert old.pieces is not None
    titles = new_titles if new_titles is not None else [""] * len(new_ids)
    for item, title in zip(new_ids, titles, strict=True):
        if not title.strip():
            raise UserError(
                f"index add: item {item!r} has no title; where items are titles (items.form) each "
                "needs one"
            )
    tokenizer = load_tokenizer(verified(folder, TOKENIZER, REPAIR), "index add")
    parts = [old.codes(), spell(tokenizer, titles, title_tokens)]
    depth = max(numbers.shape[1] for numbers in parts)
    padded = [
        np.pad(numbers, ((0, 0), (0, depth - numbers.shape[1])), constant_values=-1)
        for numbers in parts
    ]
    return make_title_catalogue(np.vstack(padded), old.pieces, old.vocabulary)


def _with_tokens(old: Catalogue, count: int) -> Catalogue:
    """One more token for each new item, behind those of the old ones."""
    (size,) = old.level_sizes
    added = np.arange(size, size + count, dtype=np.int32)[:, None]
    codes = np.vstack([old.codes(), added])
    return make_catalogue(codes, [size + count], old.level_names, old.vocabulary.extended(count))


def _books_and_vectors(
    folder: str | Path,
    dataset: InteractionDataset,
    old: Catalogue,
    new_ids: Sequence[str],
    new_documents: Sequence[str] | None,
    item_vectors: GivenVectors | None,
    scratch: Path,
) -> tuple[Codebooks, np.ndarray]:
    """(codebooks of the old codes, the new items' vectors float32 [m, d] in their
    space).
    """
    stored = CODEBOOKS in manifest_hashes(folder)
    if item_vectors is not None:
        old_vectors, new_vectors = item_vectors.old, np.asarray(item_vectors.new, np.float32)
        _check_vectors(folder, old, len(new_ids), item_vectors, stored)
    else:
        old_vectors, new_vectors = _text_vectors(folder, dataset, new_documents, scratch)
        check_finite(new_vectors, new_ids, "index add", "mend its title and text")
    if stored and (item_vectors is None or old_vectors is None):
        books = Codebooks.load(verified(folder, CODEBOOKS, REPAIR), old.level_sizes)
    else:
        assert old_vectors is not None
        vectors = np.asarray(old_vectors, np.float32)
        books = centroid_codebooks(vectors, old.codes(), list(old.level_sizes))
    if new_vectors.shape[1] != books.dim:
        raise UserError(
            f"index add: the new items' vectors have {new_vectors.shape[1]} dimensions, those that "
            f"{folder} was built from have {books.dim}; give vectors of that kind"
        )
    return books, new_vectors


def _check_vectors(
    folder: str | Path, old: Catalogue, num_new: int, item_vectors: GivenVectors, stored: bool
) -> None:
    """Raise UserError unless the vectors' counts, and the old ones' order, fit the
    index.
    """
    if item_vectors.old is None:
        kind = read_report(folder)["vectors"]["kind"]
        if not stored or "+" in kind:
            source = f"built from {kind} vectors" if stored else "given, not built from vectors"
            raise UserError(
                f"index add: the codes of {folder} were {source}; "
                "give vectors of the old and the new items (--vectors OLD.npy NEW.npy)"
            )
        if len(item_vectors.new) != num_new:
            raise UserError(f"index add: {len(item_vectors.new)} vectors for {num_new} new items")
        return
    if len(item_vectors.old) != old.num_items or len(item_vectors.new) != num_new:
        raise UserError(
            f"index add: {len(item_vectors.old)} and {len(item_vectors.new)} vectors for "
            f"{old.num_items} old and {num_new} new items"
        )
    _check_order(folder, old, item_vectors.old)


def _check_order(folder: str | Path, old: Catalogue, vectors: np.ndarray) -> None:
    """Raise UserError where the old vectors tell no more of the codes than in a random
    order.

    Items of one first code have like vectors where both are in item-index order.
    Vectors in code order have the same shape, and every new item would get the codes of
    others.
    """
    random = np.random.default_rng(0)
    codes = old.codes()[:, 0]
    rows = np.arange(old.num_items)
    if old.num_items > ORDER_SAMPLE:
        rows = np.sort(random.choice(old.num_items, ORDER_SAMPLE, replace=False))
    sample = np.asarray(vectors[rows], np.float64)
    here = _explained(sample, codes[rows])
    in_code_order = _explained(sample, codes[old.items[rows]])
    shuffled = max(
        _explained(sample, codes[rows[random.permutation(len(rows))]]) for _ in range(RANDOM_ORDERS)
    )
    if here >= max(shuffled, in_code_order):
        return
    reason = (
        "they are in code order, as cf/code-order/item_embeddings.code-order.npy is"
        if in_code_order > shuffled
        else "items of one first code are no more alike than others"
    )
    raise UserError(
        f"index add: the old items' vectors do not fit the codes of {folder}: {reason}; expected "
        "one row an item in the order of its index.json (--vectors)"
    )


def _explained(vectors: np.ndarray, codes: np.ndarray) -> float:
    """The sum of squares between the codes' means: the larger, the more alike are their
    items.
    """
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    counts = np.diff(np.append(starts, len(codes)))
    sums = np.add.reduceat(vectors[order] - vectors.mean(axis=0), starts)
    # Rounded, so that orders which are equally good are equal.
    return float(np.round((sums**2 / counts[:, None]).sum() / max((vectors**2).sum(), 1e-300), 9))


def _text_vectors(
    folder: str | Path,
    dataset: InteractionDataset,
    new_documents: Sequence[str] | None,
    scratch: Path,
) -> tuple[np.ndarray, np.ndarray]:
    documents = item_documents(dataset)
    if documents is None or new_documents is None:
        raise UserError(
            "index add: needs titles or texts of the old and the new items, or vectors of both"
        )
    vectors = read_report(folder)["vectors"]
    if vectors["kind"] != "text":
        raise UserError(
            f"index add: {folder} was built from {vectors['kind']} vectors; "
            + (
                "give such vectors of the new items (--vectors NEW.npy)"
                if vectors["kind"] == "cf"
                else "give vectors of the old and the new items (--vectors OLD.npy NEW.npy)"
            )
        )
    model = vectors["text_model"]
    return text_vectors(
        documents,
        vectors["dim"],
        vectors["seed"],
        scratch,
        new_documents,
        model,
        local_spread(len(documents), model is not None),
    )


def _assign(
    vectors: np.ndarray, books: Codebooks, old: Catalogue, new_ids: Sequence[str]
) -> np.ndarray:
    """Codes int32 [m, C] of the new items; see add_items."""
    old_codes, sizes, last = old.codes(), old.level_sizes, old.depth - 1
    codes = np.zeros((len(vectors), old.depth), np.int32)
    residuals = vectors
    for level in range(last):
        distance = squared_distances(residuals, books.levels[level])
        codes[:, level] = np.nanargmin(distance, axis=1)
        residuals = residuals - books.levels[level][codes[:, level]]
    prefix, _ = tuple_groups(np.vstack([old_codes, codes])[:, :last])
    # Within a prefix old items come first.
    order = np.argsort(prefix, kind="stable")
    starts = np.searchsorted(prefix[order], np.arange(prefix.max() + 2))
    for group in np.unique(prefix[len(old_codes) :]):
        members = order[starts[group] : starts[group + 1]]
        new = members[members >= len(old_codes)] - len(old_codes)
        held = old_codes[members[members < len(old_codes)], last]
        free = np.setdiff1d(np.arange(sizes[last]), held)
        if len(new) > len(free):
            numbers = codes[new[0], :last].tolist()
            names = zip(old.level_names, numbers, strict=False)
            name = "".join(f"<{letter}_{code}>" for letter, code in names)
            raise UserError(
                f"index add: item {new_ids[int(new[len(free)])]!r}: the prefix "
                f"{name or 'the whole catalogue'} has no code left at its last level "
                f"({sizes[last]} codes, {len(new)} new items for {len(free)} free ones); "
                "build a new index with more codes or levels"
            )
        distance = known_distances(residuals[new], books.levels[last])[:, free]
        rows, columns = linear_sum_assignment(distance)
        codes[new[rows], last] = free[columns]
    return codes
