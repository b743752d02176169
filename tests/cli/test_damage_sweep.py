"""Damage to any file of a finished run that a command reads is refused by name, or
repaired.

For each command: which files of the run it opens, found by an audit hook; that it needs no other,
by filling all others with zeros; and then, for each of these files, a flipped bit that leaves size
and time, and a file that is cut off.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.common import manifest
from ilrec_dist.config.load import load_config
from ilrec_dist.config.tree import Config
from ilrec_dist.evaluation.baselines.table import baselines_of
from ilrec_dist.evaluation.ranking import baseline_predictions
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import open_run
from tests.support.shop import damage, recommend

pytestmark = pytest.mark.slow

# What a command came to: an exit code, the line of a refusal, and a digest of its answer.
Outcome = tuple[int, str, str]

_opened: set[str] | None = None


def _note_opened(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.add(os.path.abspath(os.fspath(arguments[0])))


@functools.cache
def audit() -> None:
    """An audit hook cannot be taken out again, so there is one a process."""
    sys.addaudithook(_note_opened)


def digest(folder: Path) -> str:
    """Of all files of a folder, by name and content."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    content = [(str(path.relative_to(folder)), path.read_bytes()) for path in paths]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def answer_in_files(*words: str) -> Callable[[Path], str]:
    """Run a command of the command line, with OUT for a new folder that it
    writes to.
    """

    def run(root: Path) -> str:
        out = root / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        places = {"RUN": root / "runs/shop", "H": root / "h.parquet", "NEW": root / "new.csv"}
        argv = [str(places.get(word, word)).replace("OUT", str(out)) for word in words]
        if main(argv):
            raise SystemExit(2)
        return digest(out)

    return run


def config(root: Path) -> Config:
    return load_config(root / "c.yaml")


def again(command: str) -> Callable[[Path], str]:
    """Run a stage's command again; the results without the times, of which some are
    new.

    Where a file is found to be damaged, the stage would be made again from the beginning;
    test_finished_run.py follows that to its end.
    """

    def run(root: Path) -> str:
        run = open_run(config(root))
        names = [name for name, stage in run.stages.items() if stage.command == command]
        for name in [*names, *(before for each in names for before in run.stages[each].after)]:
            if (reason := run.reason_to_run(name)) is not None:
                print(f"made again: {name} {reason}", file=sys.stderr)
                raise SystemExit(2)
        if main([command, str(root / "c.yaml")]):
            raise SystemExit(2)
        results = json.loads((root / "runs/shop/results.json").read_text())
        page = (root / "runs/shop/report.html").read_text() if command == "evaluate" else ""
        for name in ("seconds", "stage_seconds"):
            results.pop(name, None)
        return json.dumps([results, page])

    return run


def what_a_training_reads(root: Path) -> str:
    artifacts = RunArtifacts(config(root))
    data, catalogue, trie = artifacts.training, artifacts.catalogue, artifacts.trie
    source = artifacts.reward_source()
    users = np.arange(data.num_users)
    rewards = source.fetch_async(users, np.full(len(users), 2)).result()
    arrays = [np.asarray(data.items[:]), data.offsets, catalogue.tokens, *trie.node_start]
    return hashlib.sha256(b"".join(map(bytes, map(np.ascontiguousarray, arrays)))).hexdigest() + (
        str(rewards)
    )


def the_baselines(root: Path) -> str:
    artifacts = RunArtifacts(config(root))
    users = artifacts.dataset.evaluated("test")
    lists = [
        baseline_predictions(
            baseline.name,
            artifacts.dataset,
            users=users,
            split="test",
            exclude_seen=True,
            cf_folder=artifacts.folders.cf,
            data_folder=artifacts.folders.data,
        )
        for baseline in baselines_of("lcrec")
    ]
    return str([one.metrics() for one in lists])


COMMANDS: dict[str, Callable[[Path], str]] = {
    "recommend": answer_in_files("recommend", "RUN", "--histories", "H", "--out", "OUT/r.parquet"),
    "recommend --fusion": answer_in_files(
        "recommend", "RUN", "--histories", "H", "--out", "OUT/r.parquet", "--fusion"
    ),
    "export": answer_in_files("export", "RUN", "OUT/model"),
    "export-data": answer_in_files("export-data", "RUN", "--format", "lcrec", "--out", "OUT/Shop"),
    "index add": answer_in_files("index", "add", "RUN", "--items", "NEW", "--out", "OUT/index"),
    "index report": answer_in_files("index", "report", "RUN", "--plot", "OUT/use.svg"),
    "train": again("train"),
    "evaluate": again("evaluate"),
    "a training": what_a_training_reads,
    "the baselines": the_baselines,
}


def outcome(command: str, root: Path, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """As a process of its own would have it, which has hashed nothing yet."""
    manifest._hashes.clear()
    capfd.readouterr()
    try:
        answer = COMMANDS[command](root)
    except SystemExit as stop:
        return int(str(stop)), capfd.readouterr().err.strip(), ""
    except Exception as error:
        return (2 if type(error).__name__ == "UserError" else 70), f"{error!r}", ""
    return 0, "", answer


def files_that_are_opened(command: str, root: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    global _opened
    audit()
    _opened = set()
    try:
        code, _, _ = outcome(command, root, capfd)
        opened = _opened
    finally:
        _opened = None
    assert code == 0
    run = root / "runs/shop"
    written = ("results.json", "report.html") if command == "evaluate" else ()
    return sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and str(path) in opened and path.name not in written
    )


def overwrite(path: Path, content: bytes) -> None:
    """Change a file's content and leave its time."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_damage_to_a_file_that_is_read_gives_another_answer(
    shop: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    recommend(shop)
    (shop / "new.csv").write_text("item,title\n900,Thing 900\n")
    run, began = shop / "runs/shop", time.monotonic()
    expected = outcome(command, shop, capfd)
    assert expected[0] == 0, expected
    names = files_that_are_opened(command, shop, capfd)
    assert names
    wholes = {}
    for path in [path for path in run.rglob("*") if path.is_file()]:
        name = str(path.relative_to(run))
        if name not in names and name not in ("results.json", "report.html"):
            wholes[path] = path.read_bytes()
            overwrite(path, bytes(len(wholes[path])))
    if command not in ("train", "evaluate"):
        assert outcome(command, shop, capfd) == expected, "another file is needed"
    for path, whole in wholes.items():
        overwrite(path, whole)
    wrong = []
    for name in names:
        path = run / name
        whole, status = path.read_bytes(), path.stat()
        for how in ("flipped", "cut off"):
            if how == "flipped":
                damage(path, keep_time=True)
            else:
                path.write_bytes(whole[: len(whole) // 2])
            code, line, answer = outcome(command, shop, capfd)
            # A stage's record is named by its stage too: "train sft seed 0" has two.
            named = path.name in line or (
                name.startswith(".stages/") and path.name.partition(".")[0] in line
            )
            if not (code == 2 and named and "\n" not in line) and (code, line, answer) != expected:
                wrong.append((name, how, code, line[-300:]))
            path.write_bytes(whole)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not wrong, wrong
    assert outcome(command, shop, capfd) == expected
    print(f"{command}: {len(names)} files, {time.monotonic() - began:.1f} s")
