"""`ilrec recommend` for many histories: killed, by workers, an error at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ilrec_dist.cli.main import main
from ilrec_dist.common.files import file_lock
from tests.support.shop import ITEMS, refused

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 120
# A part has 32 batches.
BATCH_SIZE = 4
PART_ROWS = 32 * BATCH_SIZE
USERS = 5 * PART_ROWS - 7


def write_histories(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [rng.choice(ITEMS, rng.integers(1, 7)).tolist() for _ in range(USERS)]
    # One user has seen everything.
    items[3] = ITEMS
    pq.write_table(pa.table({"user": [f"u{user}" for user in range(USERS)], "items": items}), path)


@pytest.fixture(scope="module")
def small_parts(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run, of small parts, histories and their answer."""
    root = tmp_path_factory.mktemp("parts")
    shutil.copytree(finished / "runs", root / "runs")
    shutil.copytree(finished / "shop", root / "shop")
    config = root / "runs/shop/config.yaml"
    config.write_text(config.read_text().replace("batch_size: 64", f"batch_size: {BATCH_SIZE}"))
    assert main(["prepare", str(config), f"runs_dir={root / 'runs'}"]) == 0
    write_histories(root / "h.parquet", 0)
    assert main(command(root, root / "whole.parquet")) == 0
    return root


def command(root: Path, out: Path, histories: str = "h.parquet") -> list[str]:
    words = ["recommend", root / "runs/shop", "--histories", root / histories, "--out", out]
    return [*map(str, words), "--exclude-seen"]


def finished_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.parts-*/[0-9]*.parquet"))


def stamps(folder: Path) -> dict[str, int]:
    """When each finished part was written."""
    return {part.name: part.stat().st_mtime_ns for part in finished_parts(folder)}


def wait_for_parts(folder: Path, count: int) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while len(finished_parts(folder)) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_killed_and_terminated_commands_leave_their_parts_and_the_same_command_goes_on(
    small_parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    argv = command(small_parts, out)
    with subprocess.Popen(
        [sys.executable, "-m", "ilrec_dist.cli", *argv], stdout=subprocess.DEVNULL
    ) as process:
        wait_for_parts(tmp_path, 1)
        process.kill()
    killed_at = len(finished_parts(tmp_path))
    assert 1 <= killed_at <= 3 and not out.exists()
    finished = stamps(tmp_path)
    (folder,) = {part.parent for part in finished_parts(tmp_path)}
    with file_lock(folder):
        assert "another `ilrec recommend` is writing it" in refused(capsys, *argv)

    def terminate() -> None:
        wait_for_parts(tmp_path, killed_at + 1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    assert main(argv) == 143
    thread.join()
    output = capsys.readouterr()
    left = USERS - killed_at * PART_ROWS
    assert f"goes on, {left} of {USERS} users are left" in output.out
    assert output.err == "ilrec: terminated; the same command goes on where it stopped\n"
    assert not out.exists()
    # What was finished is not ranked again.
    assert finished.items() <= stamps(tmp_path).items()

    # With other histories it begins anew.
    shutil.copytree(folder, tmp_path / "kept")
    write_histories(small_parts / "other.parquet", 1)
    assert main(command(small_parts, out, "other.parquet")) == 0
    output = capsys.readouterr().out
    assert "is dropped, which had other weights, options or histories" in output
    assert "goes on" not in output
    assert pq.read_table(out)["item"] != pq.read_table(small_parts / "whole.parquet")["item"]

    (tmp_path / "kept").rename(folder)
    # What a machine that loses its power may leave of a part.
    finished_parts(tmp_path)[0].write_bytes(b"")
    left = USERS - (len(finished_parts(tmp_path)) - 1) * PART_ROWS
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert f"goes on, {left} of {USERS} users are left" in output
    assert f"1 of {USERS} users get no item" in output
    assert out.read_bytes() == (small_parts / "whole.parquet").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("tp", [1, 2])
def test_two_workers_make_the_lists_of_one_process(
    small_parts: Path, tmp_path: Path, tp: int
) -> None:
    out, histories = tmp_path / "out.parquet", "h.parquet"
    whole = pq.read_table(small_parts / "whole.parquet")
    if tp == 2:
        # Of a part and some, as many small sums over the ranks take long.
        first = pq.read_table(small_parts / "h.parquet").slice(0, PART_ROWS + BATCH_SIZE)
        histories = "first.parquet"
        pq.write_table(first, small_parts / histories)
        whole = whole.filter(pc.is_in(whole["user"], first["user"].combine_chunks()))
        assert 0 < len(whole)
    settings = ["launch.engine=torchrun", "launch.workers=2", f"launch.tp={tp}"]
    assert main([*command(small_parts, out, histories), *settings]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    table = pq.read_table(out)
    assert table.drop(["score"]) == whole.drop(["score"])
    if tp == 1:
        assert out.read_bytes() == (small_parts / "whole.parquet").read_bytes()
    np.testing.assert_allclose(table["score"].to_numpy(), whole["score"].to_numpy(), atol=1e-5)
