"""`ilrec index build`, `ilrec index add` and `ilrec index report`: what the command
line calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import require_file
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.common.terminal import written_out
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.reading.item_table import read_item_table
from ilrec_dist.items.add import GivenVectors, add_items
from ilrec_dist.items.index_plot import plot_code_use
from ilrec_dist.items.index_report import open_index, report_table
from ilrec_dist.items.text_embeddings import CHUNK_ROWS
from ilrec_dist.pipeline.records import check_stands_on


def report_index(path: Path, plot: Path | None = None) -> str:
    """The table of a run's index, of a catalogue folder or of a NAME.index.json.

    With `plot` the picture is written there too (SVG).
    """
    report, catalogue = open_index(path)
    if plot is not None:
        if plot.is_dir():
            raise UserError(f"--plot {plot}: is a folder; name the file to write")
        if not plot.parent.is_dir():
            raise UserError(
                f"--plot {plot}: the folder {plot.parent} does not exist; "
                "create it or choose another"
            )
        plot_code_use(catalogue, plot)
    return report_table(report)


def add_to_index(run: Path, items: Path, out: Path, vectors: Sequence[Path] = ()) -> str:
    """Extend the index of a run by the items of a table (item, title and, if wanted,
    text).

    The longer index is written to the folder `out`; returns its table. vectors: .npy
    files that stand in for texts: the new items' vectors, of the kind that the index
    was built from, or the old items' (in the order of index.json) and the new ones'.
    Raises UserError when anything is missing, an item is there already, a prefix is
    full, or `out` exists.
    """
    folders = RunFolders(run)
    if not (folders.items / "catalogue.json").exists():
        raise UserError(
            f"{run}: not a run folder with an index (no items/catalogue.json); "
            "run `ilrec index build CONFIG` first"
        )
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another folder")
    rows = _new_items(require_file(items, "--items"))
    titles = [title or "" for title in rows["title"]]
    documents = [f"{title} {text or ''}" for title, text in zip(titles, rows["text"], strict=True)]
    item_vectors = _item_vectors(vectors) if vectors else None
    dataset = load_dataset(folders.data)
    add_items(folders.items, dataset, rows["id"], out, documents, titles, item_vectors)
    return report_index(out)


def _item_vectors(paths: Sequence[Path]) -> GivenVectors:
    if len(paths) > 2:
        raise UserError(f"--vectors: expected one or two files, found {len(paths)}")
    *old, new = [_vectors(path) for path in paths]
    if old and old[0].shape[1] != new.shape[1]:
        raise UserError(
            f"{paths[1]}: vectors of {new.shape[1]} dimensions, those of {paths[0]} have "
            f"{old[0].shape[1]} (--vectors)"
        )
    return GivenVectors(new, old[0] if old else None)


def _new_items(path: Path) -> dict[str, list[str]]:
    """The table's columns id, title and text."""
    try:
        table = read_item_table(path)
    # The reader names the key by which a run is given such a table.
    except UserError as error:
        raise UserError(str(error).replace("data.items_path", "--items")) from None
    rows: dict[str, list[str]] = table.to_pydict()
    return rows


def _vectors(path: Path) -> np.ndarray:
    try:
        vectors = np.load(require_file(path, "--vectors"), mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path}: not a readable .npy file (--vectors): {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2:
        raise UserError(f"{path}: expected an array [items, dimensions] (--vectors)")
    if vectors.dtype.kind not in "fiu":
        raise UserError(f"{path}: expected numbers, found {vectors.dtype} (--vectors)")
    for start in range(0, len(vectors), CHUNK_ROWS):
        with np.errstate(over="ignore"):
            finite = np.isfinite(vectors[start : start + CHUNK_ROWS].astype(np.float32)).all(axis=1)
        if not finite.all():
            raise UserError(
                f"{path}: row {start + int(finite.argmin()) + 1}: a value that is NaN, infinite or "
                "beyond 32-bit floats; mend it (--vectors)"
            )
    return vectors


def run_add(arguments: argparse.Namespace) -> None:
    run = Path(arguments.run)
    check_stands_on(RunFolders(run), "index", ("prepare",))
    vectors = [Path(path) for path in arguments.vectors]
    print(written_out(add_to_index(run, Path(arguments.items), Path(arguments.out), vectors)))


def run_report(arguments: argparse.Namespace) -> None:
    plot = Path(arguments.plot) if arguments.plot else None
    print(written_out(report_index(Path(arguments.index), plot)))
