"""Texts → vectors in pieces, by several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ilrec_dist.common.errors import WorkersFailed

# Vectors float32 [n, d] of n texts: a text's are the same in every piece that `_pieces` of
# text_embeddings.py makes. It can be pickled.
Embed = Callable[[Sequence[str]], np.ndarray]
# What one process embeds in the seconds that others take to begin, several times over: fewer texts
# it embeds alone. A text model takes longer for each.
FEW_TEXTS, FEW_FOR_A_MODEL = 1 << 18, 1 << 14
# On two cores, which often are one core's two threads, two processes and the command that feeds
# them took 1.2 times as long as one process.
FEW_CORES = 2
# Pieces that wait for each process, so that none is idle.
AHEAD = 2
# What a terminal or a scheduler sends to all processes of a command; only the first one answers.
FOR_THE_COMMAND = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Workers:
    """Who computes: `submit` hands out a piece, `wait`
    returns its vectors.
    """

    submit: Callable[[list[str]], Any]
    wait: Callable[[Any], np.ndarray]
    count: int


@dataclass(frozen=True)
class Spread:
    """Workers for the length of a block, and how many texts a piece of their work has:
    whole batches of the text model, so that its batches are those of one process.
    """

    start: Callable[[Embed], AbstractContextManager[Workers]]
    texts: int = 1 << 12


def local_spread(texts: int, by_model: bool) -> Spread | None:
    """A process for each core that this one may use, where that pays: with many texts
    on more than two cores.

    A text model's threads use all cores already, or it is on the GPU.
    """
    cores = len(os.sched_getaffinity(0))
    pays = cores > FEW_CORES and texts >= FEW_TEXTS and not by_model
    return Spread(partial(processes, count=cores)) if pays else None


def spread_over(
    workers: Workers, pieces: Iterable[tuple[np.ndarray, list[str]]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, vectors) of all (rows, texts), in their order; few are in memory."""
    waiting: deque[tuple[np.ndarray, Any]] = deque()
    for rows, texts in pieces:
        waiting.append((rows, workers.submit(texts)))
        if len(waiting) > AHEAD * workers.count:
            rows, handle = waiting.popleft()
            yield rows, workers.wait(handle)
    for rows, handle in waiting:
        yield rows, workers.wait(handle)


@contextmanager
def processes(embed: Embed, count: int) -> Iterator[Workers]:
    """`count` processes of this machine, which end with the block or with this process.

    Raises WorkersFailed where one of them is killed.
    """
    context = multiprocessing.get_context("spawn")
    # Its other end is closed with the block, and by the system where this process is killed.
    alive, holder = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, _begin, (embed, alive))
    try:
        # The processes begin with the first piece, and inherit what is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_COMMAND)
        try:
            pool.submit(_begun)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield Workers(lambda texts: pool.submit(_embed, texts), Future.result, count)
    except BrokenProcessPool:
        raise WorkersFailed(
            f"index: one of {count} processes that turn texts into vectors was killed, perhaps for "
            "want of memory; give the same command again"
        ) from None
    finally:
        holder.close()
        pool.shutdown(cancel_futures=True)
        alive.close()


def _begin(embed: Embed, alive: Connection) -> None:
    global _embed_here
    _embed_here = embed
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


_embed_here: Embed


def _begun() -> None:
    """The first piece, which is nothing."""


def _embed(texts: list[str]) -> np.ndarray:
    return _embed_here(texts)


def _end_with(alive: Connection) -> None:
    """End this process at once when the other end is closed."""
    with suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)
