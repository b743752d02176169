"""The driver's progress: following a growing log, the remaining time, two ways of
showing it.
"""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from ilrec_dist.reporting import progress as live
from ilrec_dist.reporting.counter import Count, write_counter
from ilrec_dist.reporting.metrics_log import METRICS_FILE, RESUMED
from ilrec_dist.reporting.progress import (
    LiveProgress,
    LogFollower,
    TrainingState,
    clock,
    follow_counter,
    stage_progress,
)


def line(step, at, **values):
    return {"step": step, "epoch": 0.0, "time": at, **values}


def append(folder, *lines):
    with open(folder / METRICS_FILE, "a") as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_follower_waits_for_whole_lines_and_notices_a_cut_file(tmp_path):
    follower = LogFollower(tmp_path)
    assert follower.read() == []
    append(tmp_path, line(1, 0), line(2, 1))
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 3,')
    assert [one["step"] for one in follower.read()] == [1, 2]
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write(' "time": 2}\n')
    assert [one["step"] for one in follower.read()] == [3]
    (tmp_path / "new").write_text(json.dumps(line(1, 0)) + "\n")
    (tmp_path / "new").replace(tmp_path / METRICS_FILE)
    assert [one["step"] for one in follower.read()] == [1]
    assert follower.read() == []


def test_remaining_time_is_that_of_the_present_run():
    state = TrainingState(total_steps=1000)
    assert state.seconds_left() is None
    for step in range(10, 110, 10):
        state.see(line(step, step * 0.5, **{"loss/total": 3.0}))
    assert state.seconds_left() == pytest.approx(900 * 0.5)
    # The training is resumed hours later from step 60.
    state.see({"step": 60, "time": 5000.0, RESUMED: 40})
    assert state.seconds_left() is None
    state.see(line(70, 5002.0))
    assert state.seconds_left() == pytest.approx(930 * 0.2)
    assert state.loss == 3.0


def test_values_keep_their_last_number():
    state = TrainingState(100)
    state.see(line(10, 1.0, **{"loss/total": 2.5, "rate/tokens_per_second": 12345.6}))
    state.see(line(10, 1.1, **{"validation/ndcg@10": 0.0712}))
    state.see(line(20, 2.0, **{"loss/total": None}))
    assert state.parts() == [
        "step 20/100",
        "12,346 tokens/s",
        "loss 2.5000",
        "val NDCG@10 0.0712",
        "0:08 left",
    ]


def test_live_progress_on_a_pipe_prints_lines(tmp_path):
    console = plain()
    with LiveProgress(
        tmp_path / "later", 100, "ilrec [seed 0]", console=console, poll_seconds=0.01
    ) as progress:
        (tmp_path / "later").mkdir()
        append(tmp_path / "later", line(10, 1.0, **{"loss/total": 2.0}))
        deadline = time.monotonic() + 5
        while progress.state.step != 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        append(tmp_path / "later", line(100, 10.0, **{"loss/total": 1.0}))
    text = console.file.getvalue().splitlines()
    assert text[0] == "ilrec [seed 0]: step 10/100 · loss 2.0000"
    assert text[1] == "ilrec [seed 0]: step 100/100 · loss 1.0000"
    assert text[2].startswith("ilrec [seed 0]: done after 0:0") and len(text) == 3


def test_plain_lines_come_every_ten_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    console = plain()
    with stage_progress("evaluate", 1000, "users", console=console) as progress:
        for second in range(1, 26):
            now[0] = float(second)
            progress(second * 40)
    text = console.file.getvalue().splitlines()
    assert text == [
        "evaluate: 40/1,000 users · 40/s · 0:24 left",
        "evaluate: 440/1,000 users · 40/s · 0:14 left",
        "evaluate: 840/1,000 users · 40/s · 0:04 left",
        "evaluate: 1,000/1,000 users · 40/s",
        "evaluate: done after 0:25",
    ]


def test_a_failed_stage_does_not_say_done():
    console = plain()
    with pytest.raises(RuntimeError), stage_progress("prepare", console=console):
        raise RuntimeError
    assert console.file.getvalue() == "prepare: stopped after 0:00\n"


class Writer:
    """In the place of the event that stops `follow_counter`: writes the next
    (file, count) before the files are read.
    """

    def __init__(self, folder, counts):
        self.folder, self.counts = folder, counts

    def wait(self, _):
        name, count = next(self.counts, ("", None))
        if count is not None:
            write_counter(self.folder / name, count)
        return count is None


def test_a_finished_count_is_shown_once_and_what_stands_still_not_again(
    tmp_path, capsys, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def counts():
        # Six were done by an interrupted command; a second and 60 others for each count below.
        for title, done, waits in (
            ("evaluate", 6, 1),
            ("evaluate", 8, 60),
            ("evaluate", 10, 60),
            ("fusions", 0, 1),
            ("fusions", 5, 60),
        ):
            for _ in range(waits):
                yield "counter", Count(title, done, 10)
                now[0] += 1.0

    follow_counter(tmp_path / "counter", "rankings", Writer(tmp_path, counts()))
    assert capsys.readouterr().out.splitlines() == [
        "evaluate: 8/10 rankings · 2.00/s · 0:01 left",
        "evaluate: 10/10 rankings · 0.07/s",
        "evaluate: done after 1:01",
        "fusions: 5/10 rankings · 5.00/s · 0:01 left",
        "fusions: done after 1:01",
    ]


def test_what_other_processes_count_has_a_bar_for_each_title(tmp_path, capsys):
    counts = iter(
        [
            ("counter-0", Count("cf", 1, 10, "full")),
            ("counter-0", Count("cf", 2, 10, "full")),
            ("counter-1", Count("cf", 3, 10, "fold0")),
            ("counter-0", Count("baselines", 0, 8, "popularity")),
            ("counter-0", Count("baselines", 1, 8, "bayes")),
        ]
    )

    follow_counter(tmp_path / "run/counter", "units", Writer(tmp_path / "run", counts))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0].partition(" after")[0] for line in lines] == [
        "cf: 2/10 units",
        # What all have done.
        "cf: 5/10 units",
        "cf: done",
        "baselines: 1/8 units",
        "baselines: done",
    ]
    assert lines[1].endswith("fold0") and lines[3].endswith("bayes")


def test_a_terminal_gets_one_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    append(tmp_path, line(50, 1.0, **{"loss/total": 2.0, "rate/tokens_per_second": 900}))
    with LiveProgress(tmp_path, 50, "sft", console=console, poll_seconds=0.01):
        pass
    assert "step 50/50 · 900 tokens/s · loss 2.0000" in console.file.getvalue()
    with stage_progress("cf", 3, "epochs", console=console) as progress:
        progress.advance(note="[loss 5.2]")
    assert "1/3 epochs" in console.file.getvalue() and "[loss 5.2]" in console.file.getvalue()
    with stage_progress("prepare", console=console):
        pass


def test_a_run_that_did_not_end_well_is_not_done(tmp_path):
    console = Console(file=io.StringIO(), width=160)
    with LiveProgress(tmp_path, 50, "sft", console=console, poll_seconds=0.01) as progress:
        progress.finished = False
    assert console.file.getvalue().startswith("sft: stopped after 0:0")


def test_clock():
    assert [clock(4.2), clock(65), clock(3725.2)] == ["0:04", "1:05", "1:02:05"]
