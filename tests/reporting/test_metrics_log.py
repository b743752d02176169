"""metrics.jsonl: what a killed writer leaves, what a resumed one drops, what readers
see.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.reporting.metrics_log import METRICS_FILE, RESUMED, MetricsLog, read_metrics


def steps(folder):
    return [line["step"] for line in read_metrics(folder) if RESUMED not in line]


def write(folder, numbers, resume_step=None):
    with MetricsLog(folder, resume_step=resume_step) as log:
        for step in numbers:
            log.write(
                step,
                step / 10,
                {"loss": {"total": 1.0 / step}, "rate/tokens_per_second": np.float32(5)},
            )


def test_lines_are_flat_and_in_order(tmp_path):
    with MetricsLog(tmp_path / "a" / "b") as log:
        log.write(3, 0.5, {"loss": {"cpo": 1.5, "cpd": {"pos0": np.float32(0.25)}}, "p_target": 1})
        # Lines are flushed before the log is closed.
        lines = read_metrics(log.folder)
    assert [list(line) for line in lines] == [
        ["step", "epoch", "time", "loss/cpo", "loss/cpd/pos0", "p_target"]
    ]
    assert lines[0]["loss/cpd/pos0"] == 0.25 and lines[0]["step"] == 3 and lines[0]["epoch"] == 0.5
    assert lines[0]["time"] > 1.7e9


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, 0.0, {"loss/total": float("nan"), "grad_norm": float("inf")})
    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=pytest.fail)
    assert line["loss/total"] is None and line["grad_norm"] is None


def test_resume_drops_later_steps_and_says_so(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    write(tmp_path, [30, 40, 50], resume_step=20)
    assert steps(tmp_path) == [10, 20, 30, 40, 50]
    notes = [line for line in read_metrics(tmp_path) if RESUMED in line]
    assert [(line["step"], line[RESUMED]) for line in notes] == [(20, 20)]


def test_first_start_with_resume_step_zero_writes_no_note(tmp_path):
    write(tmp_path, [10], resume_step=0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10]


def test_without_resume_step_lines_are_added(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [30])
    assert steps(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize(
    "torn", ['{"step": 30, "ep', "", '{"step": 30, "epoch": 1, "time": 2}', "\x00\x00\x00\n"]
)
def test_a_torn_last_line_is_left_out_and_removed(tmp_path, torn):
    write(tmp_path, [10, 20])
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write(torn)
    assert steps(tmp_path) == [10, 20]
    write(tmp_path, [30], resume_step=20)
    assert steps(tmp_path) == [10, 20, 30]
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())


def test_damage_before_the_last_line_is_named(tmp_path):
    write(tmp_path, [10, 20, 30])
    path = tmp_path / METRICS_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "nonsense", lines[2]]) + "\n")
    for use in (read_metrics, lambda folder: MetricsLog(folder, resume_step=10)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
            use(tmp_path)


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "absent") == []


def test_every_line_survives_sigkill(tmp_path):
    code = (
        "import sys, types\n"
        # The import of TensorBoard takes seconds and is not tested here.
        "class Writer:\n"
        "    def __init__(self, *a, **k): pass\n"
        "    def add_scalar(self, *a): pass\n"
        "sys.modules['torch.utils.tensorboard'] = types.SimpleNamespace(SummaryWriter=Writer)\n"
        "sys.modules.setdefault('torch', types.ModuleType('torch'))\n"
        "sys.modules.setdefault('torch.utils', types.ModuleType('torch.utils'))\n"
        "from ilrec_dist.reporting.metrics_log import MetricsLog\n"
        f"log = MetricsLog({str(tmp_path)!r})\n"
        "for step in range(1, 51): log.write(step, 0.0, {'loss/total': 1.0})\n"
        "print('written', flush=True); sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "written\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert steps(tmp_path) == list(range(1, 51))


def test_tensorboard_holds_the_scalars_and_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [10, 20, 30])
    write(tmp_path, [20], resume_step=10)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [10, 20]
