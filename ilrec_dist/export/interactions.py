"""A prepared folder → the LC-Rec triple or RecBole atomic files, so that other systems run on the same interactions and split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ilrec_dist.common.console import console
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.data.dataset import InteractionDataset, load_dataset
from ilrec_dist.items.catalogue import Catalogue
from ilrec_dist.items.lcrec_index import stored_ids

FORMATS = ("lcrec", "recbole")
HISTORY = 50  # RecBole's MAX_ITEM_LIST_LENGTH
CHUNK = 50_000  # targets written at once
# What pandas, which RecBole reads with, takes for a missing value: the default na_values of read_csv.
MISSING = [
    "",
    "#N/A N/A",
    *"#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split(),
]


def export_run(run: Path, form: str, out: Path) -> None:
    """`ilrec export-data`: the run's prepared data, for lcrec with its index where it has one; the files carry the name of the folder `out`.

    Raises UserError when the run has no prepared data, or when `out` exists: what is in it might be somebody's.
    """
    folders = RunFolders(run)
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose a new folder, or remove this one")
    index = folders.items / "index.json"
    files = export_data(
        folders.data, form, out, out.absolute().name, index if index.exists() else None
    )
    console.print(f"{out}: {', '.join(files)}", highlight=False, markup=False)


def export_data(
    folder: str | Path, form: str, out: str | Path, name: str, index: str | Path | None = None
) -> list[str]:
    """Write the prepared `folder` to the folder `out` as NAME.inter.json and the like; returns the file names.

    lcrec: NAME.inter.json, NAME.item.json and, with `index` (index.json in the index stage's folder), NAME.index.json.
    recbole: NAME.inter (timestamps as stored, or the place in the history where there are none) and NAME.item; leave-one-out over it
    (`eval_args: {split: {LS: valid_and_test}, order: TO}`) is the same split. Of a chronological split NAME.train.inter, NAME.valid.inter and
    NAME.test.inter (`benchmark_filename: [train, valid, test]`) instead of NAME.inter. Ids are kept. Raises UserError for another form, for a
    chronological split as lcrec, which cannot carry it, for an index of other items, and for ids that a RecBole file cannot hold.
    """
    if form not in FORMATS:
        raise UserError(f"export format {form!r}: expected one of {', '.join(FORMATS)}")
    dataset = load_dataset(folder)
    if dataset.split_positions is not None and form == "lcrec":
        raise UserError(
            f"{folder}: split chronologically, but files of lcrec are split by leave-one-out; prepare with data.split=leave_one_out to export"
        )
    if index is not None and form == "lcrec":
        items = Path(index).parent
        for _ in stored_ids(
            items, Catalogue.load(items), dataset.item_ids
        ):  # raises at the first that does not fit
            pass
    with committed_folder(out) as work:
        if form == "lcrec":
            _lcrec(dataset, work, name, index)
        else:
            _recbole(Path(folder), dataset, work, name)
        return sorted(path.name for path in work.iterdir())


def _lcrec(dataset: InteractionDataset, work: Path, name: str, index: str | Path | None) -> None:
    item_ids = np.array(
        [
            int(item) if item.isascii() and item.isdigit() and str(int(item)) == item else item
            for item in dataset.item_ids
        ],
        object,
    )
    with open(
        work / f"{name}.inter.json", "w", encoding="utf-8"
    ) as file:  # written a user at a time: the whole need not fit as objects
        for user, user_id in enumerate(dataset.user_ids):
            file.write(
                ("{" if user == 0 else ",\n")
                + f"{json.dumps(user_id)}: {json.dumps(item_ids[dataset.sequence(user)].tolist())}"
            )
        file.write("}\n")
    blank = [""] * dataset.num_items
    rows = zip(dataset.item_ids, dataset.titles or blank, dataset.texts or blank, strict=True)
    items = {item: {"title": title, "description": text} for item, title, text in rows}
    (work / f"{name}.item.json").write_text(
        json.dumps(items, indent=0, ensure_ascii=False), encoding="utf-8"
    )
    if index is not None:
        (work / f"{name}.index.json").write_bytes(Path(index).read_bytes())


def _recbole(folder: Path, dataset: InteractionDataset, work: Path, name: str) -> None:
    users, items = (
        _ids(dataset.user_ids, "user"),
        _ids(dataset.item_ids, "item", within_lists=dataset.split_positions is not None),
    )
    if dataset.split_positions is None:
        _inter(folder, dataset, work / f"{name}.inter", users, items)
    else:
        everyone = np.arange(dataset.num_users)
        rows = dataset.train_lengths()
        user = np.repeat(everyone, rows)
        _histories(
            dataset,
            work / f"{name}.train.inter",
            users,
            items,
            user,
            np.arange(len(user)) - np.repeat(np.cumsum(rows) - rows, rows),
        )
        for split, part in (("validation", "valid"), ("test", "test")):
            _histories(
                dataset,
                work / f"{name}.{part}.inter",
                users,
                items,
                everyone,
                dataset.target_positions(split),
            )
    blank = [""] * dataset.num_items
    with open(work / f"{name}.item", "wb") as file:
        file.write(b"item_id:token\ttitle:token_seq\ttext:token_seq\n")
        _write_rows(
            file,
            items,
            *(
                pa.array([_line(text) for text in column or blank], pa.large_string())
                for column in (dataset.titles, dataset.texts)
            ),
        )


def _inter(
    folder: Path, dataset: InteractionDataset, path: Path, users: pa.Array, items: pa.Array
) -> None:
    stream = pq.ParquetFile(folder / "interactions.parquet", pre_buffer=False)
    timed = "timestamp" in stream.schema_arrow.names
    done = 0
    with open(path, "wb") as file:
        file.write(b"user_id:token\titem_id:token\ttimestamp:float\n")
        for batch in stream.iter_batches(1_000_000):
            user = batch.column("user")
            place = np.arange(done, done + batch.num_rows) - dataset.offsets[user.to_numpy()]
            _write_rows(
                file,
                users.take(user),
                items.take(batch.column("item")),
                batch.column("timestamp") if timed else pa.array(place),
            )
            done += batch.num_rows


def _histories(
    dataset: InteractionDataset,
    path: Path,
    users: pa.Array,
    items: pa.Array,
    user: np.ndarray,
    place: np.ndarray,
) -> None:
    """One row a target, given as user and place in their sequence, with what comes before it; targets with nothing before them are left out.

    RecBole cuts neither split nor histories of such files itself, and its sequential models take HISTORY items at most.
    """
    user, place = user[place >= 1], place[place >= 1]
    with open(path, "wb") as file:
        file.write(b"user_id:token\titem_id_list:token_seq\titem_id:token\n")
        for start in range(0, len(user), CHUNK):
            who, at = user[start : start + CHUNK], place[start : start + CHUNK]
            stop = dataset.offsets[who] + at
            length = np.minimum(at, HISTORY)
            bounds = np.concatenate([[0], np.cumsum(length)])
            before = dataset.items[np.repeat(stop - bounds[1:], length) + np.arange(bounds[-1])]
            histories = pc.binary_join(
                pa.LargeListArray.from_arrays(pa.array(bounds), items.take(pa.array(before))),
                pa.scalar(" ", pa.large_string()),
            )
            _write_rows(
                file,
                users.take(pa.array(who)),
                histories,
                items.take(pa.array(dataset.items[stop])),
            )


def _ids(ids: Sequence[str], what: str, within_lists: bool = False) -> pa.Array:
    """Raises UserError for an id that would not read back: there is no way to write it otherwise. Spaces part the ids of a list."""
    column = pa.array(list(ids), pa.large_string())
    unfit = column.filter(
        pc.match_substring_regex(column, r'[\t\r\n ]|^"' if within_lists else r'[\t\r\n]|^"')
    )
    if len(unfit):
        inner = "a space, a tab or a line break" if within_lists else "a tab or a line break"
        raise UserError(
            f"{what} {unfit[0].as_py()!r}: RecBole's files cannot hold ids with {inner} in them or a quote mark at the beginning"
        )
    lost = column.filter(pc.is_in(column, pa.array(MISSING, pa.large_string())))
    if len(lost):
        raise UserError(
            f"{what} {lost[0].as_py()!r}: pandas, which RecBole reads with, takes this id for a missing value; rename it in the input and prepare again"
        )
    return column


def _line(text: str) -> str:
    """The text on one line. One that begins with a quote mark gets single ones: pandas, which RecBole reads with, would look for the closing one."""
    text = " ".join(text.split())
    return text.replace('"', "'") if text.startswith('"') else text


def _write_rows(file: BinaryIO, *columns: pa.Array) -> None:
    """Tab-separated, bare: pyarrow's own writer refuses a quote mark that it may not double."""
    lines = pc.binary_join_element_wise(
        *(column.cast(pa.large_string()) for column in columns), pa.scalar("\t", pa.large_string())
    )
    text = pc.binary_join_element_wise(
        lines, pa.scalar("", pa.large_string()), pa.scalar("\n", pa.large_string())
    )
    file.write(b"" if len(text) == 0 else text.buffers()[2])
