"""Texts become vectors in several processes: the bits of one, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from ilrec_dist.common.errors import NotWritable, UserError, WorkersFailed
from ilrec_dist.config.tree import Config
from ilrec_dist.items.config import ItemsConfig
from ilrec_dist.items.spread import FEW_TEXTS, Spread, processes
from ilrec_dist.items.text_embeddings import CHUNK_ROWS, embed_documents, text_vectors
from ilrec_dist.items.tfidf import TfidfSpace
from ilrec_dist.pipeline.stages.index import text_workers
from tests.support.embedders import lengths
from tests.support.item_words import words
from tests.support.signals import default_signals

pytestmark = pytest.mark.slow
TWO = Spread(partial(processes, count=2), texts=64)


def embedded(texts: Sequence[str], spread: Spread | None = TWO) -> np.ndarray:
    vectors = np.full((len(texts), 2), -1, np.float32)
    embed_documents(lengths, texts, vectors, spread)
    return vectors


def test_several_processes_give_the_bits_of_one() -> None:
    texts = [text * (1 + number % 3) for number, text in enumerate(words(900))] + ["", "unknown"]
    space = TfidfSpace(texts[:300], 16, 0)
    alone = np.empty((len(texts), space.dim), np.float32)
    embed_documents(space.embed, texts, alone)
    assert np.count_nonzero(alone.any(axis=1)) == 900
    together = np.empty_like(alone)
    embed_documents(space.embed, texts, together, TWO)
    assert together.tobytes() == alone.tobytes()


def test_every_row_is_its_texts_and_other_processes_compute() -> None:
    # More than one block, within which they are ordered by length.
    texts = ["x" * (number * 7919 % 50) for number in range(CHUNK_ROWS + 2000)]
    found = embedded(texts, replace(TWO, texts=1 << 12))
    assert found[:, 0].tolist() == [len(text) for text in texts]
    assert os.getpid() not in found[:, 1]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("kill", WorkersFailed, "^index: one of 2 processes that turn texts into vectors was kil"),
        ("refuse", UserError, "^items.text_model: /gone is not a model folder$"),
    ],
)
def test_what_happens_in_a_process_is_one_line(
    text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedded([*["oak"] * 300, text, *["oak"] * 300])
    assert not [child for child in psutil.Process().children() if "spawn_main" in command(child)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


SLEEP = """
import importlib
import sys
from functools import partial
import numpy as np
from ilrec_dist.items.spread import Spread, processes
from ilrec_dist.items.text_embeddings import embed_documents
from tests.support.embedders import lengths

def run(words):
    spread = Spread(partial(processes, count=2), texts=64)
    embed_documents(lengths, ["sleep " + sys.argv[1]] * 640, np.zeros((640, 2), np.float32), spread)

if __name__ == "__main__":
    main = importlib.import_module("ilrec_dist.cli.main")
    main._run = run
    sys.exit(main.main([]))
"""


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGKILL, False, -9)],
)
def test_no_process_outlives_its_command(
    tmp_path: Path, number: int, to_all: bool, code: int
) -> None:
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SLEEP)
    pids.mkdir()
    with subprocess.Popen(
        [sys.executable, script, pids],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
    ) as started:
        until = time.monotonic() + 60
        while len(list(pids.iterdir())) < 2:
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        children = [psutil.Process(int(path.name)) for path in pids.iterdir()]
        (os.killpg if to_all else os.kill)(started.pid, number)
        try:
            assert started.wait(10) == code
        finally:
            started.kill()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        assert started.stderr is not None
        errors = started.stderr.read()
    # Of a killed one Python itself says which semaphores it removes.
    assert number == signal.SIGKILL or len(errors.splitlines()) == 1, errors


def test_a_disk_without_room_for_the_vectors_is_one_line(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(NotWritable, match=f"^{tmp_path}: No space left on device; make room"):
            text_vectors(words(2000), 16, 0, tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_few_texts_and_few_cores_stay_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cases = [
        ({}, FEW_TEXTS, True),
        ({}, FEW_TEXTS - 1, False),
        ({"embedding": "cf"}, FEW_TEXTS, False),
        ({"form": "titles"}, FEW_TEXTS, False),
        ({"index": "x.json"}, FEW_TEXTS, False),
        ({"index": "x.json", "collisions": "resolve"}, FEW_TEXTS, True),
        # Its threads use all cores.
        ({"text_model": "model"}, FEW_TEXTS, False),
    ]
    for settings, texts, expected in cases:
        for cores in (1, 2, 3):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
            with text_workers(Config(items=ItemsConfig(**settings)), texts) as spread:
                assert (spread is not None) == (expected and cores > 2), (settings, cores)
