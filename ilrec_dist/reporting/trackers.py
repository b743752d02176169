"""The metrics of a training for MLflow or Weights & Biases, beside its own log.

The libraries are optional. Where they send what they get, and with which credentials,
is said to them in the environment (MLFLOW_TRACKING_URI, WANDB_MODE and others).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object, write_json

TrackerName = Literal["mlflow", "wandb"]
# What each module is installed from.
PACKAGES: dict[TrackerName, str] = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
# In a training's folder: the tracker's own name of its run, with which a resumed training goes on.
TRACKED_RUN = ".tracked-run.json"
# How long a training waits at its end until all is handed over.
CLOSE_SECONDS = 60.0
# MLflow's own defaults try for minutes, in which the other ranks wait.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
# By default they also send their makers reports of themselves, and W&B the host's name, the command
# line, paths, the git repository, the installed packages and what it measures of the machine.
RESERVE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_HOST": "worker",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "WANDB_X_SAVE_REQUIREMENTS": "false",
}


class Tracker(Protocol):
    run_id: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over finite values; does not wait for a server."""
        ...

    def close(self, finished: bool) -> None:
        """Wait until all is handed over. finished: whether the training has ended."""
        ...


def require_tracker(name: TrackerName) -> None:
    """Raise UserError where the library is not installed here."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"train.tracker {name}: its library is not installed; run `pip install "
            f"{PACKAGES[name]}` where the workers run, or set train.tracker=null"
        )


def open_tracker(name: TrackerName, folder: Path) -> Tracker:
    """The tracker of the training in `folder`, RUN/train/NAME. Raises UserError where
    the library is missing, or its server refuses or cannot be reached.

    The tracker's experiment or project has the name of the run, its run that of the
    training, unless the environment names another experiment or project.
    """
    require_tracker(name)
    for variable, value in (PATIENCE | RESERVE).items():
        os.environ.setdefault(variable, value)
    note, known = folder / TRACKED_RUN, None
    if note.exists():
        noted = read_json_object(note, "delete it, and the tracker gets a new run")
        known = noted.get("run") if noted.get("tracker") == name else None
    try:
        # The libraries are optional, and take seconds to load.
        library: Any = importlib.import_module(name)
        tracker: Tracker = (_MLflow if name == "mlflow" else _WandB)(library, folder, known)
    except Exception as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"train.tracker {name}: no run can be begun there ({type(error).__name__}: {words}); "
            "mend that, or set train.tracker=null"
        ) from error
    write_json(note, {"tracker": name, "run": tracker.run_id})
    return tracker


def close_within(tracker: Tracker, finished: bool, seconds: float = CLOSE_SECONDS) -> None:
    """Close it; the other ranks wait meanwhile, and a server may be gone.

    Raises TimeoutError where that takes longer, and what the library raises.
    """
    outcome: Future[None] = Future()

    def close() -> None:
        try:
            tracker.close(finished)
        except Exception as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=close, name="tracker", daemon=True).start()
    try:
        outcome.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"not all was handed over within {seconds:g} s") from None


class _MLflow:
    def __init__(self, library: Any, folder: Path, known: str | None) -> None:
        self._library, self._client = library, library.MlflowClient()
        if known is not None:
            self.run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", folder.absolute().parents[1].name)
        experiment = self._client.get_experiment_by_name(name)
        number = (
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        )
        self.run_id = self._client.create_run(number, run_name=folder.name).info.run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metric = self._library.entities.Metric
        metrics = [metric(_flat(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self.run_id, metrics, synchronous=False)

    def close(self, finished: bool) -> None:
        self._library.flush_async_logging()
        self._client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


def _flat(key: str) -> str:
    """A name of one level: MLflow's file store cannot have `a/b` beside `a/b/c`."""
    group, slash, rest = key.partition("/")
    return group + slash + rest.replace("/", ".")


class _WandB:
    def __init__(self, library: Any, folder: Path, known: str | None) -> None:
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", folder.absolute().parents[1].name),
            name=folder.name,
            id=known,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(folder)),
            settings=library.Settings(console="off", silent=True),
        )
        self.run_id = self._run.id
        # Steps that are run again after a resume are not refused as past ones.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
