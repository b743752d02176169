"""Keeps what a command is about to replace, so that a command that is refused changes nothing.

The outputs of finished stages, their records, the configuration and the results are linked (or
copied, where the file system has no links) into `.previous/` before they are replaced. A refused
command puts them back; a command that ends well drops them. An interrupted command leaves them,
for the next one to do either.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ilrec_dist.common.files import read_json_object, write_json
from ilrec_dist.common.run_layout import PREVIOUS, STAGES

# Files of the run's folder itself that a command may replace.
FILES = ("config.yaml", "results.json", "report.html")
CONTENTS = "contents.json"


class Preserved:
    """What a run's folder held before the current attempt to replace it."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / PREVIOUS

    @property
    def outputs(self) -> list[str]:
        """The paths, below the run's folder, of the outputs that are kept."""
        return self._contents()["outputs"]

    def _contents(self) -> dict[str, list[str]]:
        path = self.folder / CONTENTS
        return read_json_object(path) if path.exists() else {"outputs": [], "files": []}

    @property
    def records(self) -> Path:
        return self.folder / STAGES

    def keep(self, output: Path) -> None:
        """Keep the output of a finished stage, unless an earlier state of it is kept already.

        To be called before anything about the stage is changed.
        """
        name = output.relative_to(self.root).as_posix()
        contents = self._contents()
        kept = contents["outputs"]
        if any(name == other or name.startswith(f"{other}/") for other in kept):
            return
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            _link_tree(self.root / STAGES, self.records)
            contents["files"] = [file for file in FILES if (self.root / file).exists()]
            for file in contents["files"]:
                shutil.copy2(self.root / file, self.folder / file)
        _link_tree(output, self.folder / "outputs" / name)
        # Last, so that a process that is killed leaves either all of an output or none.
        write_json(self.folder / CONTENTS, contents | {"outputs": [*kept, name]})

    def put_back(self, written: Sequence[Path]) -> None:
        """Restore all that is kept; `written` are the outputs that the command wrote.

        Killed in the middle, it can be called again.
        """
        for output in written:
            shutil.rmtree(output, ignore_errors=True)
        contents = self._contents()
        for name in contents["outputs"]:
            target, kept = self.root / name, self.folder / "outputs" / name
            if kept.exists():
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(kept, target)
        for file in FILES:
            if file not in contents["files"]:
                (self.root / file).unlink(missing_ok=True)
            elif (self.folder / file).exists():
                os.replace(self.folder / file, self.root / file)
        if self.records.exists():
            shutil.rmtree(self.root / STAGES, ignore_errors=True)
            os.replace(self.records, self.root / STAGES)
        self.drop()

    def drop(self) -> None:
        (self.folder / CONTENTS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _link_tree(source: Path, target: Path) -> None:
    """Copy a folder by hard links: its files are replaced when they change, never written to."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link_file, symlinks=True)


def link_file(source: str, target: str) -> None:
    """Make `target` another name of the file `source`; a copy where there are no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)
