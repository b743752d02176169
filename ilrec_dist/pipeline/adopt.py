"""Takes finished stages over from other run
folders that hold them with the same fingerprints.

A fingerprint covers a stage's settings, its input and the stages before it, so that
the output of one folder is what the other one would make. Files are linked, or copied
where the file system has no links: a run replaces its files and never writes to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ilrec_dist.common.files import committed_folder, write_json
from ilrec_dist.common.manifest import folder_files, with_checksum
from ilrec_dist.common.run_layout import STAGES
from ilrec_dist.pipeline.preserved import link_file
from ilrec_dist.pipeline.records import damaged_file, read_begun, read_record
from ilrec_dist.pipeline.run import Run


def adopt_stages(
    run: Run, folders: Iterable[Path], names: Iterable[str] | None = None
) -> list[str]:
    """Take over every stage of `run` that is not
    current and that one of the folders holds.

    names: the stages, in the run's order; None:
    all. Returns those that were taken over.
    """
    folders = [folder for folder in folders if folder != run.folder]
    adopted = []
    with run.alone():
        for name in run.stages if names is None else names:
            if run.is_current(name):
                continue
            for folder in folders:
                record = _finished(folder, name, run.fingerprint(name))
                if record is not None:
                    _take_over(run, name, folder, record)
                    adopted.append(name)
                    break
    return adopted


def _finished(folder: Path, name: str, fingerprint: str) -> dict[str, Any] | None:
    """The record of the stage in the run folder,
    if it is whole and has that fingerprint.
    """
    record = read_record(folder / STAGES / f"{name}.json")
    begun = read_begun(folder / STAGES / f"{name}.begun.json")
    if record is None or record["fingerprint"] != fingerprint:
        return None
    if begun is not None and begun["fingerprint"] != fingerprint:
        return None
    return record if damaged_file(folder / record["output"], record) is None else None


def _take_over(run: Run, name: str, folder: Path, record: dict[str, Any]) -> None:
    stage, output = run.stages[name], folder / record["output"]
    # The output of one stage may lie within another's, so that only the record's files are taken.
    # Where the record has a part of them, as for a training, the others tell of its course.
    files = set(record["files"])
    if stage.required is not None:
        files.update(folder_files(output))
    with committed_folder(stage.output) as staged:
        for file in sorted(files):
            (staged / file).parent.mkdir(parents=True, exist_ok=True)
            link_file(str(output / file), str(staged / file))
    run.begin(name)
    # Last, so that a process that is killed before leaves a stage that has not been made.
    write_json(run.record_file(name), with_checksum(record))
