"""`ilrec index add`: codes for new items without changing an old one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.build import ATOMIC, catalogue_report, read_report, write_items
from ilrec_dist.items.catalogue import Catalogue, make_catalogue, make_title_catalogue
from ilrec_dist.items.collisions import collision_report, squared_distances, tuple_groups
from ilrec_dist.items.lcrec_index import stored_ids
from ilrec_dist.items.residual_quantizer import Codebooks, centroid_codebooks
from ilrec_dist.items.text_embeddings import item_documents, text_vectors
from ilrec_dist.items.titles import TOKENIZER, load_tokenizer, spell


def add_items(
    folder: str | Path,
    dataset: InteractionDataset,
    new_ids: Sequence[str],
    out: str | Path,
    new_documents: Sequence[str] | None = None,
    new_titles: Sequence[str] | None = None,
    vectors: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Extend the catalogue in `folder` (built over `prepared`) by new items; write the longer one to `out` and return its report.

    New items get the item indices that follow the old ones, in the order given. Each takes the nearest centroid at every level but the last, and at the
    last the nearest code that no item of its prefix holds; new items of one prefix share its free codes out at the least total distance.
    new_documents: one text each, embedded with the old items' texts. Or vectors: (float [num_items, d] old, float [m, d] new) of any one kind.
    Where an item is one token of its own (items.form atomic) there is nothing to be near to: new items take new tokens behind the old ones, and need neither.
    Where it is its title, the new items are `new_titles`, spelt in the old pieces.
    Raises UserError for an index of other items than `dataset` holds, an id that is already there, texts that are missing, and a prefix with no code left.
    """
    old = Catalogue.load(folder)
    scratch = next(
        place for place in (Path(out).absolute(), *Path(out).absolute().parents) if place.exists()
    )  # nothing is made before all is well
    if not scratch.is_dir():
        raise UserError(f"index add: {scratch} is a file, expected a folder (--out {out})")
    old_ids = list(stored_ids(folder, old, dataset.item_ids))
    known = set(old_ids)
    for item in new_ids:
        if item in known:
            raise UserError(
                f"index add: item {item!r} is in {Path(folder) / 'index.json'} already; leave it out"
            )
        known.add(item)
    before = read_report(folder, *(["title_tokens"] if old.pieces is not None else []))
    if old.pieces is not None:
        catalogue = _with_titles(folder, old, new_ids, new_titles, before["title_tokens"])
    else:
        catalogue = _with_codes(folder, dataset, old, new_ids, new_documents, vectors, scratch)
    report = {
        **before,
        **catalogue_report(catalogue),
        "added": len(new_ids),
        "collisions": {**before["collisions"], "after": collision_report(catalogue.codes())},
    }
    with committed_folder(out) as work:
        write_items(work, catalogue, [*old_ids, *new_ids], report)
        if old.pieces is not None:
            shutil.copy(Path(folder) / TOKENIZER, work / TOKENIZER)
    return report


def _with_titles(
    folder: str | Path,
    old: Catalogue,
    new_ids: Sequence[str],
    new_titles: Sequence[str] | None,
    title_tokens: int,
) -> Catalogue:
    assert old.pieces is not None
    titles = new_titles if new_titles is not None else [""] * len(new_ids)
    bare = next(
        (item for item, title in zip(new_ids, titles, strict=True) if not title.strip()), None
    )
    if bare is not None:
        raise UserError(
            f"index add: item {bare!r} has no title; where items are titles (items.form) each needs one"
        )
    both = [
        old.codes(),
        spell(load_tokenizer(Path(folder) / TOKENIZER, "index add"), titles, title_tokens),
    ]
    depth = max(numbers.shape[1] for numbers in both)
    return make_title_catalogue(
        np.vstack(
            [
                np.pad(numbers, ((0, 0), (0, depth - numbers.shape[1])), constant_values=-1)
                for numbers in both
            ]
        ),
        old.pieces,
        old.vocabulary,
    )


def _with_codes(
    folder: str | Path,
    dataset: InteractionDataset,
    old: Catalogue,
    new_ids: Sequence[str],
    new_documents: Sequence[str] | None,
    vectors: tuple[np.ndarray, np.ndarray] | None,
    scratch: Path,
) -> Catalogue:
    codes, sizes, vocabulary = old.codes(), list(old.level_sizes), old.vocabulary
    if old.level_names == (ATOMIC,):
        added = np.arange(sizes[0], sizes[0] + len(new_ids), dtype=np.int32)[:, None]
        sizes = [sizes[0] + len(new_ids)]
        vocabulary = vocabulary.extended(len(new_ids))
    else:
        old_vectors, new_vectors = (
            vectors
            if vectors is not None
            else _text_vectors(folder, dataset, new_documents, scratch)
        )
        if len(old_vectors) != old.num_items or len(new_vectors) != len(new_ids):
            raise UserError(
                f"index add: {len(old_vectors)} and {len(new_vectors)} vectors for {old.num_items} old and {len(new_ids)} new items"
            )
        books = centroid_codebooks(np.asarray(old_vectors, np.float32), codes, sizes)
        added = _assign(np.asarray(new_vectors, np.float32), books, codes, sizes, old, new_ids)
    return make_catalogue(np.vstack([codes, added]), sizes, old.level_names, vocabulary)


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
    vectors = read_report(folder, "vectors")["vectors"]
    if vectors["kind"] != "text":
        raise UserError(
            f"index add: {folder} was built from {vectors['kind']} vectors; give such vectors of the old and the new items"
        )
    return text_vectors(
        documents, vectors["dim"], vectors["seed"], scratch, new_documents, vectors["text_model"]
    )


def _assign(
    vectors: np.ndarray,
    books: Codebooks,
    old_codes: np.ndarray,
    sizes: list[int],
    old: Catalogue,
    ids: Sequence[str],
) -> np.ndarray:
    last = len(sizes) - 1
    codes = np.zeros((len(vectors), len(sizes)), np.int32)
    rest = vectors
    for level in range(last):
        codes[:, level] = np.nanargmin(squared_distances(rest, books.levels[level]), axis=1)
        rest = rest - books.levels[level][codes[:, level]]
    everyone = np.vstack([old_codes, codes])
    prefix, _ = tuple_groups(everyone[:, :last])
    order = np.argsort(prefix, kind="stable")
    starts = np.searchsorted(prefix[order], np.arange(prefix.max() + 2))
    for group in np.unique(prefix[len(old_codes) :]):
        members = order[starts[group] : starts[group + 1]]  # old items come first
        new = members[members >= len(old_codes)] - len(old_codes)
        free = np.setdiff1d(
            np.arange(sizes[last]), old_codes[members[members < len(old_codes)], last]
        )
        if len(new) > len(free):
            name = (
                "".join(
                    f"<{letter}_{code}>"
                    for letter, code in zip(old.level_names, codes[new[0], :last], strict=False)
                )
                or "the whole catalogue"
            )
            raise UserError(
                f"index add: item {ids[int(new[len(free)])]!r}: the prefix {name} has no code left at its last level ({sizes[last]} codes, "
                f"{len(new)} new items for {len(free)} free ones); build a new index with more codes or levels"
            )
        distance = squared_distances(rest[new], books.levels[last])
        distance = np.where(
            np.isnan(distance), np.nanmax(distance, axis=1, keepdims=True), distance
        )[:, free]
        rows, columns = linear_sum_assignment(distance)
        codes[new[rows], last] = free[columns]
    return codes
