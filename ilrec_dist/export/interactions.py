"""`ilrec export-data`: a run's prepared data in a format that other systems read."""

from __future__ import annotations

from pathlib import Path

from ilrec_dist.common.console import console
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import committed_folder
from ilrec_dist.common.manifest import MANIFEST, manifest_hashes, verify
from ilrec_dist.common.run_layout import RunFolders
from ilrec_dist.data.dataset import load_dataset
from ilrec_dist.data.formats import NAMES
from ilrec_dist.data.reading.source import load_format
from ilrec_dist.items.lcrec_index import INDEX, stored_ids


def export_run(run: Path, form: str, out: Path) -> None:
    """Write the run's data to the new folder `out`, whose name the files carry.

    The LC-Rec triple takes the run's index along where the index stage wrote one.
    Raises UserError when the run has no prepared data, when that index is missing or
    damaged, and when `out` exists: what is in it might be somebody's.
    """
    folders = RunFolders(run)
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose a new folder, or remove this one")
    index = folders.items / INDEX
    name = out.absolute().name
    if (folders.items / MANIFEST).exists() and INDEX in manifest_hashes(folders.items):
        verify(folders.items, [INDEX])
    files = export_data(folders.data, form, out, name, index if index.exists() else None)
    console.print(f"{out}: {', '.join(files)}", highlight=False, markup=False)


def export_data(
    folder: str | Path, form: str, out: str | Path, name: str, index: str | Path | None = None
) -> list[str]:
    """Write the prepared `folder` to the folder `out`; returns the names of the files.

    form: a format that has a writer (`write_lcrec`, `write_recbole`). index: index.json
    in the folder of the index stage, which becomes NAME.index.json of the LC-Rec
    triple. Reading the files gives the same interactions. Raises UserError for another
    form, for an index of other items, and for what the format cannot hold.
    """
    write = load_format(form).write if form in NAMES else None
    if write is None:
        writable = ", ".join(name for name in NAMES if load_format(name).write is not None)
        raise UserError(f"export format {form!r}: expected one of {writable}")
    dataset = load_dataset(folder)
    with committed_folder(out) as work:
        write(Path(folder), dataset, work, name)
        if form == "lcrec" and index is not None:
            items = Path(index).parent
            # The first id that does not fit raises.
            for _ in stored_ids(items, dataset.item_ids):
                pass
            (work / f"{name}.index.json").write_bytes(Path(index).read_bytes())
        return sorted(path.name for path in work.iterdir())
