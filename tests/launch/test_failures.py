"""Which failures of the workers are tried again: those that another attempt may not
meet.
"""

import pytest

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.job import Job, run_job
from ilrec_dist.launch.workers import run_workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("started_workers")]


def job(tmp_path, function: str) -> Job:
    return Job(f"tests.support.failing:{function}", {"folder": str(tmp_path)}, str(tmp_path))


def attempts(tmp_path) -> int:
    return len((tmp_path / "attempts").read_text())


def run_group(job: Job, restarts: int) -> None:
    """What Ray and torchrun do: start again until it ends well, `restarts` times at
    most.
    """
    for _ in range(1 + restarts):
        try:
            return run_job(job)
        except Exception as error:
            last = error
    raise last


@pytest.mark.parametrize(
    ("function", "expected", "by_user"),
    [("fail_alike", 2, False), ("refuse", 1, True), ("fill_disk", 1, False)],
)
def test_a_failure_that_would_come_again_is_not_tried_again(tmp_path, function, expected, by_user):
    run_group(job(tmp_path, function), restarts=5)
    assert attempts(tmp_path) == expected
    note = job(tmp_path, function).failure_file.read_text()
    assert f'"by_user": {str(by_user).lower()}' in note


@pytest.mark.parametrize("function", ["fail_otherwise", "lose_a_peer"])
def test_other_failures_are_tried_again(tmp_path, function):
    with pytest.raises((ValueError, RuntimeError)):
        run_group(job(tmp_path, function), restarts=4)
    assert attempts(tmp_path) == 5
    assert not job(tmp_path, function).failure_file.exists()


def test_torchrun_ends_with_the_cause(tmp_path):
    launch = LaunchConfig(engine="torchrun", device="cpu", threads=1, max_failures=5)
    with pytest.raises(WorkersFailed, match=r"ValueError: the same as ever \(failing.py:\d+\)"):
        run_workers(launch, job(tmp_path, "fail_alike"))
    assert attempts(tmp_path) == 2
    with pytest.raises(UserError, match="data.csv: row 3"):
        run_workers(launch, job(tmp_path, "refuse"))
