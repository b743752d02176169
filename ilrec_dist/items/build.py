"""`ilrec index`: a given index.json, or codes built by residual quantisation → the catalogue folder and its report."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import (
    committed_folder,
    read_json_object,
    require_file,
    sha256_file,
    write_json,
)
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.collisions import collision_report, first_collision, resolve_collisions
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.lcrec_index import read_index, write_index
from ilrec_dist.items.residual_quantizer import Codebooks, centroid_codebooks, residual_codes
from ilrec_dist.items.text_embeddings import item_documents, item_vectors, text_vectors
from ilrec_dist.items.titles import TOKENIZER, build_titles
from ilrec_dist.items.trie import Trie

ATOMIC = "item"  # the name of the one level of a catalogue whose items are a token each


def input_files(config: ItemsConfig) -> list[Path]:
    """Files whose bytes decide whether the stage must run again; raises UserError when one is missing."""
    files = [require_file(config.index, "items.index")] if config.index else []
    if config.form == "titles" and config.tokenizer:
        files.append(require_file(config.tokenizer, "items.tokenizer"))
    if config.text_model:
        folder = Path(config.text_model)
        inner = (path for path in folder.rglob("*") if path.is_file())
        files += sorted(
            path
            for path in inner
            if not any(part.startswith(".") for part in path.relative_to(folder).parent.parts)
        )  # not downloaders' notes
    return files


def build_index(
    config: ItemsConfig,
    dataset: InteractionDataset,
    out: str | Path,
    cf_embeddings: np.ndarray | None = None,
) -> dict[str, Any]:
    """Codes for every item → the folder `out`: the catalogue's files, index.json, report.json. Returns the report.

    A given `items.index` is read; otherwise codes are built (`items.embedding`; cf_embeddings float [num_items, d] by item index where that says cf).
    Where items are titles the tokenizer is written beside them (see titles.py).
    Collisions follow `items.collisions`: keep; refuse (UserError naming two items); resolve (see collisions.resolve_collisions).
    """
    if config.form == "titles":
        return _build_titles(config, dataset, out)
    scratch = Path(out).parent
    codes, sizes, names, vectors, books = _codes(config, dataset, cf_embeddings, scratch)
    before = collision_report(codes)
    how, changed = "none", 0
    if config.collisions == "refuse":
        _refuse_collision(config, dataset, codes, names)
    elif config.collisions == "resolve" and before["items"]:
        if vectors is None:
            vectors, books = _cost_vectors(config, dataset, cf_embeddings, codes, sizes, scratch)
        resolution = resolve_collisions(codes, sizes, vectors, books)
        codes, sizes, how, changed = (
            resolution.codes,
            resolution.level_sizes,
            resolution.how,
            resolution.items_changed,
        )
        names += (
            next([letter] for letter in string.ascii_lowercase if letter not in names)
            if len(sizes) > len(names)
            else []
        )
    catalogue = make_catalogue(codes, sizes, names)
    built = (
        f"residual quantisation of {config.embedding} vectors"
        if config.form == "semantic"
        else "one token per item"
    )
    report = {
        "source": config.index or built,
        "index_sha256": sha256_file(config.index) if config.index else None,
        "vectors": {
            "kind": config.embedding,
            "dim": config.embedding_dim,
            "seed": config.seed,
            "text_model": config.text_model,
        },
        **catalogue_report(catalogue),
        "collisions": {
            "rule": config.collisions,
            "before": before,
            "after": collision_report(codes),
            "resolved_by": how,
            "items_changed": changed,
        },
    }
    with committed_folder(out) as folder:
        write_items(folder, catalogue, dataset.item_ids, report)
    return report


def write_items(
    folder: Path, catalogue: Catalogue, item_ids: Sequence[str], report: dict[str, Any]
) -> None:
    """The catalogue's files, its trie, index.json and report.json."""
    catalogue.save(folder)
    Trie(catalogue).save(folder)
    write_index(folder / "index.json", catalogue, item_ids)
    write_json(folder / "report.json", report)


def _build_titles(
    config: ItemsConfig, dataset: InteractionDataset, out: str | Path
) -> dict[str, Any]:
    catalogue, tokenizer = build_titles(
        dataset, config.title_tokens, config.title_vocab_size, config.tokenizer
    )
    codes = catalogue.codes()
    if config.collisions == "refuse" and (pair := first_collision(codes)) is not None:
        one, other = (dataset.item_ids[item] for item in pair)
        raise UserError(
            f"items.form titles: items {one!r} and {other!r} have the same title within {config.title_tokens} tokens, which items.collisions: refuse forbids; "
            "raise items.title_tokens, mend the titles, or set it to keep"
        )
    found = collision_report(codes)
    report = {
        "source": f"titles of at most {config.title_tokens} tokens",
        "title_tokens": config.title_tokens,
        **catalogue_report(catalogue),
        "collisions": {
            "rule": config.collisions,
            "before": found,
            "after": found,
            "resolved_by": "none",
            "items_changed": 0,
        },
    }
    with committed_folder(out) as folder:
        write_items(folder, catalogue, dataset.item_ids, report)
        tokenizer.save(str(folder / TOKENIZER))
    return report


def _codes(
    config: ItemsConfig,
    dataset: InteractionDataset,
    cf_embeddings: np.ndarray | None,
    scratch: Path,
) -> tuple[np.ndarray, list[int], list[str], np.ndarray | None, Codebooks | None]:
    """(codes, level sizes, level names, and where codes were built the vectors and codebooks)."""
    if config.form == "atomic":
        return (
            np.arange(dataset.num_items, dtype=np.int32)[:, None],
            [dataset.num_items],
            [ATOMIC],
            None,
            None,
        )
    if config.index:
        return *read_index(require_file(config.index, "items.index"), dataset.item_ids), None, None
    vectors = item_vectors(config, dataset, cf_embeddings, scratch)
    codes, books = residual_codes(vectors, config.levels, config.codes_per_level, config.seed)
    return (
        codes,
        [config.codes_per_level] * config.levels,
        list(string.ascii_lowercase[: config.levels]),
        vectors,
        books,
    )


def _cost_vectors(
    config: ItemsConfig,
    dataset: InteractionDataset,
    cf_embeddings: np.ndarray | None,
    codes: np.ndarray,
    sizes: list[int],
    scratch: Path,
) -> tuple[np.ndarray | None, Codebooks | None]:
    """For a given index: vectors by text, by CF where there is no text, else none; and each code's centroid."""
    documents = item_documents(dataset)
    if documents is not None:
        vectors = text_vectors(
            documents, config.embedding_dim, config.seed, scratch, model=config.text_model
        )[0]
    elif cf_embeddings is not None:
        vectors = np.asarray(cf_embeddings, np.float32)
    else:
        return None, None
    return vectors, centroid_codebooks(vectors, codes, sizes)


def _refuse_collision(
    config: ItemsConfig, dataset: InteractionDataset, codes: np.ndarray, names: list[str]
) -> None:
    pair = first_collision(codes)
    if pair is not None:
        code = "".join(
            f"<{name}_{number}>" for name, number in zip(names, codes[pair[0]], strict=True)
        )
        raise UserError(
            f"{config.index or 'the built index'}: items {dataset.item_ids[pair[0]]!r} and {dataset.item_ids[pair[1]]!r} share the code {code}, "
            "which items.collisions: refuse forbids; mend the file, or set it to keep or resolve"
        )


def read_report(folder: str | Path, *keys: str) -> dict[str, Any]:
    """The report.json that `ilrec index` wrote into `folder`. Raises UserError where it lacks what all such reports hold, or one of `keys`."""
    path = Path(folder) / "report.json"
    report = read_json_object(path)
    lacking = [
        key
        for key in ("source", "items", "vocab_size", "levels", "collisions", *keys)
        if key not in report
    ]
    if not lacking and not isinstance(report["collisions"], dict):
        lacking = ["collisions"]
    if lacking:
        raise UserError(
            f"{path}: damaged: no usable {lacking[0]!r} in it; remove {folder} and run `ilrec index` again"
        )
    return report


def code_use(catalogue: Catalogue, level: int) -> np.ndarray:
    """int64 [codes of the level]: items that have each code there; titles that have ended before are none of them."""
    numbers = catalogue.vocabulary.numbers(catalogue.tokens[:, level])
    codes = numbers[numbers >= 0] - catalogue.level_starts()[level]
    return np.bincount(codes, minlength=catalogue.level_sizes[level])


def catalogue_report(catalogue: Catalogue) -> dict[str, Any]:
    """Sizes, and per level: its codes, how many occur, the entropy of their use in bits (at most log2 of the codes), and the items of the busiest one."""
    levels = []
    for level, size in enumerate(catalogue.level_sizes):
        use = code_use(catalogue, level)
        share = use[use > 0] / use.sum()
        levels.append(
            {
                "name": catalogue.level_names[level],
                "codes": size,
                "used": int((use > 0).sum()),
                "entropy_bits": float(-(share * np.log2(share)).sum()) + 0.0,
                "largest": int(use.max()),
            }
        )
    return {"items": catalogue.num_items, "vocab_size": catalogue.vocab_size, "levels": levels}
