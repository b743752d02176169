"""Keeps what a command is about to replace, so
that a command that is refused changes nothing.

The outputs of finished stages and of unfinished trainings, their records, the
configuration and the results are linked (or copied, where the file system has no links)
into `.previous/` before they are replaced. A refused command puts them back; a command
that ends well drops them. An interrupted command leaves them, for the next one to do
either.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ilrec_dist.common.disk import writing_to
from ilrec_dist.common.files import read_json_object, write_json
from ilrec_dist.common.run_layout import CONFIG, PREVIOUS, STAGES, RunFolders
from ilrec_dist.launch.attempts import ATTEMPTS

# Files of the run's folder itself that a command may replace.
FILES = (CONFIG, "results.json", "report.html")
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
        if not path.exists():
            return {"outputs": [], "files": []}
        return read_json_object(path, f"remove {self.folder}, which an interrupted command left")

    @property
    def records(self) -> Path:
        return self.folder / STAGES

    @property
    def attempts(self) -> Path:
        """What workers note of their attempts; a refused command's is not told."""
        return RunFolders(self.root).trainings / ATTEMPTS

    def note(self) -> None:
        """Keep the records, the configuration and
        the results; to be called before any change.

        Where an interrupted command has left
        outputs here, what it kept is still wanted.
        """
        if self.outputs:
            return
        with writing_to(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
        if (self.root / STAGES).is_dir():
            _link_tree(self.root / STAGES, self.records)
        if self.attempts.is_dir():
            # Its lines are added to in place, so links would not keep them.
            shutil.copytree(self.attempts, self.folder / ATTEMPTS)
        files = [file for file in FILES if (self.root / file).exists()]
        for file in files:
            shutil.copy2(self.root / file, self.folder / file)
        write_json(self.folder / CONTENTS, {"outputs": [], "files": files})

    def keep(self, output: Path) -> None:
        """Keep the output of a stage, unless an earlier state of it is kept already.

        To be called after `note`, before anything about the stage is changed.
        """
        name = output.relative_to(self.root).as_posix()
        contents = self._contents()
        kept = contents["outputs"]
        if any(name == other or name.startswith(f"{other}/") for other in kept):
            return
        _link_tree(output, self.folder / "outputs" / name)
        # Last, so that a process that is killed leaves either all of an output or none.
        write_json(self.folder / CONTENTS, contents | {"outputs": [*kept, name]})

    def put_back(self, written: Sequence[Path], new: Sequence[str] = ()) -> None:
        """Restore all that is kept, and remove
        `written`, outputs that the command wrote.

        new: stages whose records of this command stay.
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
        if (self.folder / ATTEMPTS).exists():
            shutil.rmtree(self.attempts, ignore_errors=True)
            os.replace(self.folder / ATTEMPTS, self.attempts)
        if self.records.exists():
            for name in new:
                for file in (f"{name}.json", f"{name}.begun.json"):
                    if (self.root / STAGES / file).exists():
                        shutil.copy2(self.root / STAGES / file, self.records / file)
            shutil.rmtree(self.root / STAGES, ignore_errors=True)
            os.replace(self.records, self.root / STAGES)
        self.drop()

    def drop(self) -> None:
        (self.folder / CONTENTS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _link_tree(source: Path, target: Path) -> None:
    """Copy a folder by hard links: its files are
    replaced when they change, never written to.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link_file, symlinks=True)


def link_file(source: str, target: str) -> None:
    """Make `target` another name of the file
    `source`; a copy where there are no links.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)
