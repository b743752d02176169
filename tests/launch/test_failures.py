"""Which failures of the workers are tried again: those that another attempt may not
meet.
"""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.failures import describe, identity, is_of_another_rank
from ilrec_dist.launch.job import FOR_WORKERS, Job, run_job
from ilrec_dist.launch.workers import run_workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("started_workers")]


# These fail in torch.
OF_TORCH = ("run_out_of_memory", "name_no_interface", "share_a_gpu", "lose_a_peer_of_nccl")


def job(tmp_path, function: str) -> Job:
    module = "failing_torch" if function in OF_TORCH else "failing"
    return Job(f"tests.support.{module}:{function}", {"folder": str(tmp_path)}, str(tmp_path))


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
    [
        ("fail_alike", 2, False),
        ("run_out_of_memory", 2, False),
        ("name_no_interface", 2, False),
        ("share_a_gpu", 2, False),
        ("refuse", 1, True),
        ("fill_disk", 1, False),
    ],
)
def test_a_failure_that_would_come_again_is_not_tried_again(tmp_path, function, expected, by_user):
    run_group(job(tmp_path, function), restarts=5)
    assert attempts(tmp_path) == expected
    note = job(tmp_path, function).failure_file.read_text()
    assert f'"by_user": {str(by_user).lower()}' in note


@pytest.mark.parametrize("function", ["fail_otherwise", "lose_a_peer", "lose_a_peer_of_nccl"])
def test_other_failures_are_tried_again(tmp_path, function):
    with pytest.raises((ValueError, RuntimeError)):
        run_group(job(tmp_path, function), restarts=4)
    assert attempts(tmp_path) == 5
    assert not job(tmp_path, function).failure_file.exists()


def raised(error: Exception) -> Exception:
    """The error with a place where it arose, which is the same for all."""
    try:
        raise error
    except Exception as caught:
        return caught


def of_an_actor(cause: Exception, process: int) -> Exception:
    text = f"ray::RewardActor.fetch() (pid={process}, ip=10.0.0.1)\n  File ...\n{cause!r}"
    return RayTaskError("fetch", text, cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (MemoryError("want 8.00 GiB"), MemoryError("want 9.00 GiB"), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 96"),
            True,
        ),
        (OSError("/dev/shm/nccl-a1 (size 96)"), OSError("/dev/shm/nccl-b2 (size 96)"), True),
        (OSError("port 4001, pid 12"), OSError("port 4002, pid 13"), True),
        (of_an_actor(ValueError("no"), 12), of_an_actor(ValueError("no"), 13), True),
        (of_an_actor(ValueError("no"), 12), of_an_actor(ValueError("yes"), 12), False),
        (ValueError("row 5"), ValueError("row 6"), False),
        (ValueError("row 5"), TypeError("row 5"), False),
        (MemoryError("want 8.00 GiB"), ValueError("want 8.00 GiB"), False),
    ],
)
def test_what_differs_between_attempts_that_fail_alike_is_not_compared(one, other, same):
    first, second = raised(one), raised(other)
    assert (identity(first) == identity(second)) is same
    assert not is_of_another_rank(first)
    # The user sees the numbers.
    assert str(getattr(one, "cause", one)) in describe(first)


def test_the_place_of_missing_memory_is_compared():
    elsewhere = MemoryError()
    try:
        raise elsewhere
    except MemoryError:
        assert identity(elsewhere) != identity(raised(MemoryError()))


def test_the_end_of_an_actor_is_that_of_another_process():
    assert is_of_another_rank(raised(ActorDiedError()))


def test_torchrun_ends_with_the_cause(tmp_path):
    launch = LaunchConfig(engine="torchrun", device="cpu", threads=1, max_failures=5)
    with pytest.raises(WorkersFailed, match=r"ValueError: the same as ever \(failing.py:\d+\)"):
        run_workers(launch, job(tmp_path, "fail_alike"))
    assert attempts(tmp_path) == 2
    with pytest.raises(UserError, match="data.csv: row 3"):
        run_workers(launch, job(tmp_path, "refuse"))


def test_torchrun_s_workers_start_with_their_variables(tmp_path, monkeypatch):
    """tests/faults/test_kill.py looks at Ray's."""
    for name in FOR_WORKERS:
        monkeypatch.delenv(name, raising=False)
    launch = LaunchConfig(engine="torchrun", device="cpu", threads=1)
    run_workers(launch, job(tmp_path, "note_environment"))
    started_with = (tmp_path / "environment").read_text().splitlines()
    # FAISS would keep a flat index on a GPU that they see.
    variables = FOR_WORKERS | {"CUDA_VISIBLE_DEVICES": ""}
    assert all(f"{name}={value}" in started_with for name, value in variables.items())
