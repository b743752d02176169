"""Threads change when work is done, not its order nor its errors."""

import threading
import time

import pytest

from ilrec_dist.data.ingest.threads import ahead, ordered_map


def test_results_come_in_order_with_few_in_flight():
    lock, running, most, asked, together = threading.Lock(), [0], [0], [], threading.Barrier(3)

    def items():
        for number in range(12):
            asked.append(number)
            yield number

    def work(number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        if number < 3:
            # The barrier breaks with an error where three threads do not run at once.
            together.wait(60)
        time.sleep(0.002 * (number % 3))
        with lock:
            running[0] -= 1
        return number * number

    results = ordered_map(work, items(), workers=3)
    assert next(results) == 0 and len(asked) == 4, "no more is taken than may wait"
    assert list(results) == [number * number for number in range(1, 12)] and most[0] == 3


def test_a_source_that_waits_for_ever_is_left_when_the_check_says_so():
    def items():
        yield 1
        threading.Event().wait()

    def check():
        raise TimeoutError("no place")

    stream = ahead(items(), check=check)
    assert next(stream) == 1
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no place"):
        next(stream)
    assert time.monotonic() - began < 30
    # A source that comes to its end is not disturbed.
    assert list(ahead(range(3), check=lambda: None)) == [0, 1, 2]


def test_an_error_reaches_the_consumer_after_what_came_before_it():
    def items():
        yield from range(3)
        raise RuntimeError("the fourth")

    for source in (ahead(items()), ordered_map(lambda number: number, items(), workers=1)):
        found = []
        with pytest.raises(RuntimeError, match="the fourth"):
            for number in source:
                found.append(number)
        assert found[:2] == [0, 1]


def test_a_consumer_that_stops_ends_the_thread():
    before = threading.active_count()
    stream = ahead(iter(range(1000)), count=1)
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before
