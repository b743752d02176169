"""Texts → vectors by the tasks of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import ray

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.places import POLL_SECONDS, TakePlaces
from ilrec_dist.items.spread import Embed, Workers

RETRIES = 3


@contextmanager
def ray_tasks(embed: Embed, take_places: TakePlaces, retries: int = RETRIES) -> Iterator[Workers]:
    """A task for each piece, on what is taken of the cluster that this process is
    connected to.

    A task whose process or node is lost runs again, `retries` times at most; then
    WorkersFailed is raised, as it is where no place is free in time.
    """
    with take_places(None) as places:
        task: Any = ray.remote(max_retries=retries, **places.options)(_embed)
        shared = ray.put(embed)
        wait = partial(_wait, check=places.check)
        yield Workers(lambda texts: task.remote(shared, texts), wait, places.count)


def _wait(handle: Any, check: Callable[[], None]) -> np.ndarray:
    while not ray.wait([handle], timeout=POLL_SECONDS)[0]:
        check()
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


def _embed(embed: Embed, texts: list[str]) -> np.ndarray:
    return embed(texts)
