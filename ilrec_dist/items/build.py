"""`ilrec index`: codes that are given or built,
titles, or a token each → the catalogue folder.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder, require_file, sha256_file, write_json
from ilrec_dist.common.manifest import write_manifest
from ilrec_dist.data.dataset import InteractionDataset
from ilrec_dist.items.catalogue import Catalogue, make_catalogue
from ilrec_dist.items.collisions import (
    Resolution,
    collision_report,
    first_collision,
    resolution_preview,
    resolve_collisions,
)
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.index_report import catalogue_report, collision_warning
from ilrec_dist.items.language_model import ExtendedTokenizer, LanguageModel
from ilrec_dist.items.lcrec_index import INDEX, read_index, write_index
from ilrec_dist.items.residual_quantizer import Codebooks, centroid_codebooks, residual_codes
from ilrec_dist.items.spread import Spread
from ilrec_dist.items.text_embeddings import (
    check_cf_vectors,
    document_vectors,
    item_documents,
    quantizer_vectors,
)
from ilrec_dist.items.titles import (
    TOKENIZER,
    load_tokenizer,
    required_titles,
    title_catalogue,
    train_tokenizer,
)
from ilrec_dist.items.trie import Trie

# The name of the one level of a catalogue whose items are a token each.
ATOMIC = "item"


def input_files(config: ItemsConfig) -> list[Path]:
    """Files whose bytes decide whether the stage must run again.

    Raises UserError when one is missing.
    """
    files = [require_file(config.index, "items.index")] if config.index else []
    if config.form == "titles" and config.tokenizer:
        files.append(require_file(config.tokenizer, "items.tokenizer"))
    if config.text_model:
        folder = Path(config.text_model)
        # Hidden folders hold downloaders' notes.
        files += sorted(
            path
            for path in folder.rglob("*")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parent.parts)
        )
    return files


def build_catalogue(
    config: ItemsConfig,
    dataset: InteractionDataset,
    out: str | Path,
    cf_embeddings: np.ndarray | None = None,
    model: LanguageModel | None = None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Write the catalogue of all items to the folder `out` and return its report.

    A given `items.index` is read; otherwise codes are built (`items.embedding`;
    cf_embeddings float [num_items, d] by item index where that says cf). The folder
    holds the catalogue's files, its trie, index.json, report.json, manifest.json, for
    built codes the codebooks, for titles the tokenizer. Collisions follow
    `items.collisions`: keep; refuse (UserError naming two items); resolve (see
    collisions.resolve_collisions). With `model` the codes are added to its tokenizer,
    which is stored as well, and have the ids that this gives them; titles are spelt in
    its own tokens. The workers of `spread` share the texts out among them.
    """
    if config.form == "titles":
        return _build_titles(config, dataset, out, model)
    scratch = Path(out).parent
    item_codes = _codes(config, dataset, cf_embeddings, scratch, spread)
    before = collision_report(item_codes.codes)
    resolution = Resolution(item_codes.codes, item_codes.level_sizes, "none", 0)
    preview = resolution_preview(item_codes.codes, item_codes.level_sizes)
    names = item_codes.level_names
    if config.collisions == "refuse":
        _refuse_collision(config, dataset, item_codes)
    elif config.collisions == "resolve" and before["items"]:
        vectors, books = item_codes.vectors, item_codes.books
        if vectors is None:
            vectors, books = _cost_vectors(
                config, dataset, cf_embeddings, item_codes, scratch, spread
            )
        resolution = resolve_collisions(item_codes.codes, item_codes.level_sizes, vectors, books)
        if len(resolution.level_sizes) > len(names):
            names = [*names, next(name for name in string.ascii_lowercase if name not in names)]
    catalogue = make_catalogue(resolution.codes, resolution.level_sizes, names)
    tokenizer = None
    if model is not None:
        token_names = catalogue.token_names()
        tokenizer = ExtendedTokenizer(
            model, [token_names[token] for token in catalogue.vocabulary.item_tokens.tolist()]
        )
        catalogue = catalogue.in_vocabulary(tokenizer.vocabulary)
    report = {
        "source": item_codes.source,
        "index_sha256": sha256_file(config.index) if config.index else None,
        "vectors": {
            "kind": config.embedding,
            "dim": config.embedding_dim,
            "seed": config.seed,
            "text_model": config.text_model,
        },
        **catalogue_report(catalogue),
        "items_passed_over": item_codes.items_passed_over,
        "items_without_text": item_codes.items_without_text,
        "collisions": {
            "rule": config.collisions,
            "before": before,
            "after": collision_report(resolution.codes),
            "resolved_by": resolution.how,
            "items_changed": resolution.items_changed,
            "resolve_would": preview if config.collisions == "keep" else {"how": "none"},
        },
    }
    report["warning"] = collision_warning(report)
    with committed_folder(out) as folder:
        if item_codes.books is not None:
            item_codes.books.save(folder)
        if tokenizer is not None:
            tokenizer.save(folder)
        write_items(folder, catalogue, dataset.item_ids, report)
    return report


def write_items(
    folder: Path, catalogue: Catalogue, item_ids: Sequence[str], report: dict[str, Any]
) -> None:
    """Write the catalogue's files, its trie,
    index.json and report.json, and record all files.
    """
    catalogue.save(folder)
    Trie(catalogue).save(folder)
    write_index(folder / INDEX, catalogue, item_ids)
    write_json(folder / "report.json", report)
    write_manifest(folder, {})


def _build_titles(
    config: ItemsConfig,
    dataset: InteractionDataset,
    out: str | Path,
    model: LanguageModel | None,
) -> dict[str, Any]:
    titles, extended, vocabulary = required_titles(dataset), None, None
    if model is not None:
        extended = ExtendedTokenizer(model, ())
        tokenizer, vocabulary = extended.backend, extended.title_vocabulary
    elif config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer, "items.tokenizer")
    else:
        tokenizer = train_tokenizer(titles, config.title_vocab_size)
    catalogue = title_catalogue(titles, tokenizer, config.title_tokens, vocabulary)
    _refuse_early_end(dataset, catalogue)
    codes = catalogue.codes()
    if config.collisions == "refuse" and (pair := first_collision(codes)) is not None:
        first, second = (dataset.item_ids[item] for item in pair)
        raise UserError(
            f"items.form titles: items {first!r} and {second!r} have the same title within "
            f"{config.title_tokens} tokens, which items.collisions: refuse forbids; "
            "raise items.title_tokens, mend the titles, or set it to keep"
        )
    shared = collision_report(codes)
    report = {
        "source": f"titles of at most {config.title_tokens} tokens",
        "title_tokens": config.title_tokens,
        **catalogue_report(catalogue),
        "collisions": {
            "rule": config.collisions,
            "before": shared,
            "after": shared,
            "resolved_by": "none",
            "items_changed": 0,
        },
    }
    report["warning"] = collision_warning(report)
    with committed_folder(out) as folder:
        tokenizer.save(str(folder / TOKENIZER))
        if extended is not None:
            extended.save(folder)
        write_items(folder, catalogue, dataset.item_ids, report)
    return report


def _refuse_early_end(dataset: InteractionDataset, catalogue: Catalogue) -> None:
    """Raise UserError for a title that has the end token among its words."""
    items = np.arange(catalogue.num_items)
    ends = (catalogue.item_tokens(items) == catalogue.vocabulary.end).sum(axis=1)
    if (ends > 1).any():
        item = int(np.flatnonzero(ends > 1)[0])
        end = catalogue.token_names()[int(catalogue.vocabulary.item_tokens[0])]
        raise UserError(
            f"items.form titles: the title of item {dataset.item_ids[item]!r} has the token {end} "
            "in it, which is where titles end; mend the title"
        )


@dataclass(frozen=True)
class _Codes:
    """Every item's codes before collisions are dealt with."""

    source: str
    codes: np.ndarray  # int32 [n, C]
    level_sizes: list[int]
    level_names: list[str]
    # What built codes were quantised from and with; None for others.
    vectors: np.ndarray | None = None
    books: Codebooks | None = None
    items_passed_over: int = 0
    items_without_text: int = 0


def _codes(
    config: ItemsConfig,
    dataset: InteractionDataset,
    cf_embeddings: np.ndarray | None,
    scratch: Path,
    spread: Spread | None,
) -> _Codes:
    if config.form == "atomic":
        numbers = np.arange(dataset.num_items, dtype=np.int32)[:, None]
        return _Codes("one token per item", numbers, [dataset.num_items], [ATOMIC])
    if config.index:
        index = read_index(require_file(config.index, "items.index"), dataset.item_ids)
        return _Codes(
            config.index,
            index.codes,
            index.level_sizes,
            index.level_names,
            items_passed_over=index.items_passed_over,
        )
    vectors = quantizer_vectors(config, dataset, cf_embeddings, scratch, spread)
    codes, books = residual_codes(vectors, config.levels, config.codes_per_level, config.seed)
    documents = item_documents(dataset) if "text" in config.embedding else None
    return _Codes(
        f"residual quantisation of {config.embedding} vectors",
        codes,
        [config.codes_per_level] * config.levels,
        list(string.ascii_lowercase[: config.levels]),
        vectors,
        books,
        items_without_text=sum(not text.strip() for text in documents or ()),
    )


def _cost_vectors(
    config: ItemsConfig,
    dataset: InteractionDataset,
    cf_embeddings: np.ndarray | None,
    item_codes: _Codes,
    scratch: Path,
    spread: Spread | None,
) -> tuple[np.ndarray | None, Codebooks | None]:
    """For a given index: vectors by text, by CF
    where there is no text, else none; centroids.
    """
    documents = item_documents(dataset)
    if documents is not None:
        vectors = document_vectors(config, documents, dataset.item_ids, scratch, spread)
    elif cf_embeddings is not None:
        vectors = check_cf_vectors(cf_embeddings, dataset.item_ids)
    else:
        return None, None
    return vectors, centroid_codebooks(vectors, item_codes.codes, item_codes.level_sizes)


def _refuse_collision(config: ItemsConfig, dataset: InteractionDataset, item_codes: _Codes) -> None:
    pair = first_collision(item_codes.codes)
    if pair is None:
        return
    numbers = item_codes.codes[pair[0]].tolist()
    code = "".join(
        f"<{name}_{number}>" for name, number in zip(item_codes.level_names, numbers, strict=True)
    )
    advice = (
        "mend the file, or set it to keep or resolve"
        if config.index
        else "set it to keep or resolve, or raise items.levels or items.codes_per_level"
    )
    raise UserError(
        f"{config.index or 'the built index'}: items {dataset.item_ids[pair[0]]!r} and "
        f"{dataset.item_ids[pair[1]]!r} share the code {code}, which items.collisions: refuse "
        f"forbids; {advice}"
    )
