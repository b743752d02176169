"""No damage to a file of a finished run gives another answer.

A command either refuses the damaged file by name, or does not read it. An audit hook
notes which files of the run a command opens. Each of these is damaged on its own, by a
flipped bit that leaves its size and time, by its second half cut off, and by being
deleted, which may also leave the answer as it was. All others are damaged together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ilrec_dist.cf.rewards.index import write_code_order
from ilrec_dist.cli.main import main
from ilrec_dist.common import manifest
from ilrec_dist.common.errors import UserError
from ilrec_dist.config.load import load_config
from ilrec_dist.pipeline.artifacts import RunArtifacts
from ilrec_dist.pipeline.execute import open_run
from ilrec_dist.pipeline.reward_source import open_reward_source
from tests.support.shop import files, recommend

pytestmark = pytest.mark.slow

# Exit code, the line of a refusal, and a digest of the answer.
Outcome = tuple[int, str, str]

_opened: set[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.add(os.path.abspath(os.fspath(arguments[0])))


@functools.cache
def _audit() -> None:
    # A hook cannot be taken out again, so there is one a process.
    sys.addaudithook(_note)


def _command(root: Path, *words: str) -> str:
    """What a command prints and writes to the folder OUT."""
    shutil.rmtree(root / "out", ignore_errors=True)
    (root / "out").mkdir()
    places = {"RUN": "runs/shop", "H": "h.parquet", "NEW": "new.csv", "CONFIG": "c.yaml"}
    argv = [str(root / places[word]) if word in places else word for word in words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([word.replace("OUT", str(root / "out")) for word in argv])
    if code:
        raise SystemExit(code)
    written = {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted((root / "out").rglob("*"))
        if path.is_file()
    }
    return repr([written, printed.getvalue() if words[0] in ("index", "status") else ""])


def _evaluate(root: Path) -> str:
    """The results without the times; that the
    report comes of them is the command's work too.

    Where the stage would be made again because of the damage, that counts as a refusal.
    """
    reason = open_run(load_config(root / "c.yaml")).reason_to_run("evaluate")
    if reason is not None:
        raise UserError(f"evaluate.json: {reason}")
    _command(root, "evaluate", "CONFIG")
    results = json.loads((root / "runs/shop/results.json").read_text())
    return repr([{key: value for key, value in results.items() if "seconds" not in key}])


def _training(root: Path) -> str:
    """What a training reads of the run: sequences, codes, rewards."""
    artifacts = RunArtifacts(load_config(root / "c.yaml"))
    data, trie = artifacts.training, artifacts.trie
    users = np.arange(data.num_users)
    rewards = open_reward_source(artifacts).fetch_async(users, np.full(len(users), 2)).result()
    return repr([data.items[:].tobytes(), trie.catalogue.tokens.tobytes(), rewards.tobytes()])


COMMANDS: dict[str, Callable[[Path], str]] = {
    name: functools.partial(lambda root, words: _command(root, *words), words=words)
    for name, words in {
        "recommend": ("recommend", "RUN", "--histories", "H", "--fusion", "--out", "OUT/r.parquet"),
        "export": ("export", "RUN", "OUT/model"),
        "export-data": ("export-data", "RUN", "--format", "lcrec", "--out", "OUT/Shop"),
        "index add": ("index", "add", "RUN", "--items", "NEW", "--out", "OUT/index"),
        "index report": ("index", "report", "RUN"),
    }.items()
} | {"evaluate": _evaluate, "a training": _training}


def _outcome(command: str, root: Path) -> Outcome:
    """As of a process of its own, which has hashed nothing yet."""
    manifest._hashes.clear()
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            answer = COMMANDS[command](root)
    except UserError as error:
        return 2, str(error), ""
    except SystemExit as stop:
        return int(str(stop.code)), errors.getvalue().strip(), ""
    except Exception as error:
        return 70, repr(error), ""
    return 0, "", hashlib.sha256(answer.encode()).hexdigest()


@contextlib.contextmanager
def _damaged(path: Path, how: str) -> Iterator[None]:
    """A file damaged for the block; a flipped bit leaves its time."""
    whole, status = path.read_bytes(), path.stat()
    if how == "deleted":
        path.unlink()
        try:
            yield
        finally:
            path.write_bytes(whole)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return
    content = bytearray(whole if how == "flipped" else whole[: len(whole) // 2])
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if how == "flipped":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _opened_by(command: str, root: Path) -> tuple[Outcome, list[str]]:
    """What comes of a command, and which of the run's files it opens."""
    global _opened
    _audit()
    _opened = set()
    try:
        outcome, opened = _outcome(command, root), _opened
    finally:
        _opened = None
    run = root / "runs/shop"
    return outcome, [name for name in sorted(files(root)) if str(run / name) in opened]


def _outcome_with(command: str, root: Path, names: Iterable[str], how: str) -> Outcome:
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(_damaged(root / "runs/shop" / name, how))
        return _outcome(command, root)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_refused_by_name_or_not_read(shop: Path, command: str) -> None:
    recommend(shop)
    (shop / "new.csv").write_text("item,title\n900,Thing 900\n")
    if command == "a training":
        # With an index of each fold on disk, as for a large catalogue.
        artifacts = RunArtifacts(load_config(shop / "c.yaml"))
        large = dataclasses.replace(artifacts.config.cf, reward_index="flat")
        write_code_order(large, artifacts.folders.cf, artifacts.catalogue)
    expected, opened = _opened_by(command, shop)
    assert expected[0] == 0 and opened, expected
    # The predictions of all methods are read in one way, and the beginnings of all stages.
    sampled = [
        name
        for name in opened
        if not (name.startswith("evaluation/") or name.endswith(".begun.json"))
        or name.startswith(("evaluation/sft-seed0/", ".stages/train"))
    ]
    wrong: list[object] = []
    for how in ("flipped", "cut off"):
        for name in sampled:
            code, line, answer = _outcome_with(command, shop, [name], how)
            # The record of a stage is named by its stage too.
            names = [Path(name).name]
            if name.startswith(".stages/"):
                names.append(f"stage {Path(name).name.partition('.')[0]}")
            named = any(one in line for one in names) and "\n" not in line
            if not (code == 2 and named) and (code, line, answer) != expected:
                wrong.append((name, how, code, line[-300:]))
    for name in sampled:
        # Without its curves a run has the same results but for what is drawn of them.
        if not (command == "evaluate" and name.endswith("/metrics.jsonl")):
            code, line, answer = _outcome_with(command, shop, [name], "deleted")
            if (code, line, answer) != expected and (code != 2 or "\n" in line or not line):
                wrong.append((name, "deleted", code, line[-300:]))
    for how in ("flipped", "cut off"):
        others = {name for name in files(shop) if name not in opened}
        # A file may be missed by its size alone.
        while (outcome := _outcome_with(command, shop, others, how)) != expected:
            missed = {name for name in others if Path(name).name in outcome[1]}
            if how == "flipped" or outcome[0] != 2 or not missed:
                wrong.append(("a file that it does not open", how, *outcome))
                break
            others -= missed
    assert not wrong, "\n".join(map(str, wrong))
    assert _outcome(command, shop) == expected
