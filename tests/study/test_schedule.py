"""How many cells run at once, and what the end of a cell's process means."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.room import Room, find_room
from ilrec_dist.study.cells import make_cells
from ilrec_dist.study.config import load_study
from ilrec_dist.study.priority import SESSION_NICENESS
from ilrec_dist.study.schedule import side_by_side
from ilrec_dist.study.state import exit_outcome
from tests.support.tiny_study import write_study


@pytest.mark.parametrize(
    ("launch", "room", "jobs", "expected"),
    [
        ({"threads": 1}, Room("CPU", 8), None, 4),
        ({"threads": 3}, Room("CPU", 8), None, 2),
        ({"threads": 2, "workers": 2, "tp": 2}, Room("CPU", 8), None, 2),
        # Without threads a cell's workers share all cores.
        ({"threads": None}, Room("CPU", 8), None, 1),
        ({"threads": 9}, Room("CPU", 8), None, 1),
        ({"threads": None, "workers": 2, "tp": 2}, Room("GPU", 8, tuple("01234567")), None, 4),
        ({"threads": 1}, Room("CPU", 8), 3, 3),
        ({"threads": 1}, Room("CPU", 2), 50, 4),
    ],
)
def test_as_many_cells_run_as_there_is_room_for(
    tmp_path, monkeypatch, launch, room, jobs, expected
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    path = write_study(tmp_path, base={"launch": launch}, seeds=[0, 1])
    study, _ = load_study(path)
    assert side_by_side(make_cells(study, path), room, jobs) == expected


@pytest.mark.skipif(not SESSION_NICENESS.exists(), reason="this kernel has no niceness of sessions")
def test_a_cell_of_a_study_of_low_priority_has_it_in_its_own_session_too():
    cell = "import os; print(os.nice(0), open('/proc/self/autogroup').read().split()[-1])"
    study = (
        "import subprocess, sys; from ilrec_dist.study.priority import *; lower_priority();"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True,"
        " preexec_fn=keep_priority)"
    )
    done = subprocess.run(
        [sys.executable, "-c", study, cell],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["19", "19"]


@pytest.mark.slow
def test_the_room_of_a_ray_cluster_is_what_its_nodes_have():
    with ray_session(LaunchConfig(workers=3)) as resources:
        on_cluster = LaunchConfig(ray_address="auto", workers=3, threads=4, device="cpu")
        room = find_room(on_cluster)
        assert room == Room("CPU", int(resources["CPU"])) and room.total >= 3
        # The cluster gives each worker one core, however many threads it has.
        assert room.needed_by(on_cluster) == 3


@pytest.mark.parametrize(
    ("code", "last_line", "expected"),
    [
        (0, "", ("done", "")),
        (2, "ilrec: error: no such file", ("refused", "no such file")),
        (1, "ilrec: error: the workers failed", ("failed", "the workers failed")),
        (1, "", ("failed", "exit code 1")),
        (2, "ilrec: error: loss is nan\nsome library ends", ("refused", "loss is nan")),
        (143, "ilrec: terminated", ("interrupted", "the same command goes on")),
        (-15, "", ("killed", "by signal 15")),
    ],
)
def test_the_end_of_a_cell_is_told_by_its_exit_code_and_its_last_words(
    tmp_path, code, last_line, expected
):
    log = tmp_path / "cell.log"
    log.write_text(f"prepare: done\n{last_line}\n" if last_line else "")
    assert exit_outcome(code, log) == expected
