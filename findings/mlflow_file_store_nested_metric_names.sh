#!/usr/bin/env bash
# mlflow-skinny 3.17.2: with the file store, a metric named like the group of another is lost without an error, and so is
# what stands behind it in its batch.
#
# Behaviour: names of metrics may contain slashes, by which MLflow's pages group them, and `loss` beside `loss/cpo` is a
# valid pair. The file store makes a file of the one and a folder of the other, so the second that comes cannot be written.
# `log_batch(..., synchronous=False)`, which a training loop uses so as not to wait, only prints a line of its logger;
# `flush_async_logging()` returns as if all were written, and the run can be ended as FINISHED.
# Output seen: after the batches [loss] and [loss/cpo, learning_rate] the run has {'loss': 1.0} alone, learning_rate is gone
# too, flush raised nothing and the status is FINISHED. Only `wait()` on what log_batch returns raises. In the other order
# [loss] is lost. The same calls on the SQLite store keep all three.
# Why it matters: totals with their parts below them (loss and loss/..., mean and mean/position) are how training metrics
# are named for TensorBoard, where both exist side by side. Handed on to MLflow as they are, a column of the curves is
# missing, and metrics whose names are blameless with it, in runs that are marked as finished.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlflow-skinny==3.17.2 sqlalchemy==2.0.51 alembic==1.18.4
cat > "$folder/batches.py" <<'PY'
import sys

import mlflow
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

mlflow.set_tracking_uri(sys.argv[1])
client = MlflowClient()
experiment = client.create_experiment("losses")


def logged(*batches):
    run = client.create_run(experiment).info.run_id
    operations = [
        client.log_batch(run, [Metric(name, value, 0, 0) for name, value in batch], synchronous=False)
        for batch in batches
    ]
    mlflow.flush_async_logging()
    client.set_terminated(run, "FINISHED")
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    return found.data.metrics, operations


total, parts = [("loss", 1.0)], [("loss/cpo", 0.5), ("learning_rate", 0.1)]
first, operations = logged(total, parts)
second, _ = logged(parts, total)
print("total first:", first, "parts first:", second)
if sys.argv[2] == "all":
    assert first == second == {"loss": 1.0, "loss/cpo": 0.5, "learning_rate": 0.1}
else:
    assert first == {"loss": 1.0}, "the file store keeps nested names now"
    assert second == {"loss/cpo": 0.5, "learning_rate": 0.1}
    try:
        operations[1].wait()
    except Exception as error:
        print(f"wait() raises {type(error).__name__}")
    else:
        raise AssertionError("wait() no longer raises")
PY
cd "$folder"
MLFLOW_ALLOW_FILE_STORE=true venv/bin/python batches.py "file://$folder/store" first
venv/bin/python batches.py "sqlite:///$folder/store.db" all
