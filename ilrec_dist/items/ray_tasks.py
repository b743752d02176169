"""Texts → vectors by the tasks of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.items.spread import Embed, Workers

RETRIES = 3


@contextmanager
def ray_tasks(embed: Embed, on_gpus: bool = False, retries: int = RETRIES) -> Iterator[Workers]:
    """A task for each piece, on a core of the cluster that this process is connected
    to, or on a GPU where there is one.

    A task whose process or node is lost runs again, `retries` times at most; then
    WorkersFailed is raised.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0)) if on_gpus else 0
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if gpus else {"num_cpus": 1}
    task: Any = ray.remote(max_retries=retries, **options)(_embed)
    shared = ray.put(embed)

    def wait(handle: Any) -> np.ndarray:
        try:
            vectors: np.ndarray = ray.get(handle)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())
            raise WorkersFailed(
                f"index: a task that turns texts into vectors failed on the cluster: {reason}; "
                "give the same command again"
            ) from None
        return vectors

    count = gpus or max(1, int(resources.get("CPU", 0)))
    yield Workers(lambda texts: task.remote(shared, texts), wait, count)


def _embed(embed: Embed, texts: list[str]) -> np.ndarray:
    return embed(texts)
