"""Work that overlaps in threads, with little in flight and results in order.

NumPy's sorts, Arrow and files release the interpreter's lock.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ilrec_dist.common.places import POLL_SECONDS

A = TypeVar("A")
B = TypeVar("B")


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[A], B], items: Iterable[A], workers: int | None = None
) -> Iterator[B]:
    """Yield function(item) of each item in order, `workers` (all cores) at a time.

    At most that many results wait for the consumer.
    """
    workers = workers or cores()
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[B]] = deque()
        try:
            for item in items:
                if len(pending) == workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(function, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def ahead(
    items: Iterable[A], count: int = 2, check: Callable[[], None] | None = None
) -> Iterator[A]:
    """Yield the same items, made in a thread at most `count` before their use.

    An error there is raised here. `check`, for items that others make, is called
    every POLL_SECONDS while there is none; when it raises, or this process is
    interrupted, the thread that still waits for them is left alone.
    """
    ready: queue.Queue[tuple[A | None, BaseException | None]] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: A | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put(item, None)
            put(None, StopIteration())
        except BaseException as error:
            # The consumer raises it.
            put(None, error)

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    try:
        while True:
            try:
                item, error = ready.get(timeout=None if check is None else POLL_SECONDS)
            except queue.Empty:
                assert check is not None
                check()
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            # The next item is waited for without holding this one.
            item = None
    finally:
        stopped.set()
        if check is None:
            thread.join()
