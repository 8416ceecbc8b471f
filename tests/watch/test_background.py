"""The worker: in order, bounded, never waited for but at the end; tries with waits."""

from __future__ import annotations

import threading
import time

import pytest

from sana_tune.watch.background import Worker, persist


def worker(longest: int = 8) -> tuple[Worker, list[Exception]]:
    failures: list[Exception] = []
    return Worker("test", longest, failures.append), failures


def held(made: Worker) -> threading.Event:
    """Keep the worker busy until the event that this answers is set."""
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait()

    made.put(wait)
    assert begun.wait(10)
    return gate


def test_jobs_run_in_order_and_a_failing_one_stops_none():
    made, failures = worker()
    done: list[int] = []
    assert made.put(lambda: done.append(1)) and made.put(lambda: 1 / 0) and made.put(lambda: done.append(2))  # type: ignore[func-returns-value]
    assert made.finish(5) and done == [1, 2]
    assert [type(error) for error in failures] == [ZeroDivisionError]
    assert not made.put(lambda: done.append(3)), "it has ended"


def test_a_full_queue_takes_no_more_and_putting_never_waits():
    made, _ = worker(longest=2)
    gate, done = held(made), []
    begin = time.perf_counter()
    put = [made.put(lambda number=number: done.append(number), passing=number == 1) for number in range(4)]  # type: ignore[misc]
    assert time.perf_counter() - begin < 5
    assert put == [True, True, True, False], "the passing one gave way to the third, and nothing to the fourth"
    gate.set()
    assert made.finish(5) and done == [0, 2]


def test_a_job_of_the_same_key_takes_the_place_of_the_one_that_waits():
    made, _ = worker()
    gate, done = held(made), []
    for number in range(5):
        made.put(lambda number=number: done.append(number), key="status")  # type: ignore[misc]
    gate.set()
    assert made.finish(5) and done == [4]


def test_the_end_does_not_wait_longer_than_allowed():
    made, _ = worker()
    gate = threading.Event()
    made.put(gate.wait)
    begin = time.monotonic()
    assert not made.finish(0.2) and 0.15 < time.monotonic() - begin < 10
    assert made.hurry.is_set()
    gate.set()


@pytest.mark.parametrize(("fails", "tries"), [(0, 1), (2, 3), (5, 4)])
def test_persisting(fails: int, tries: int):
    seen: list[int] = []

    def work() -> None:
        seen.append(1)
        if len(seen) <= fails:
            raise ConnectionError(str(len(seen)))

    told: list[float] = []
    begin = time.monotonic()
    if fails >= tries:
        with pytest.raises(ConnectionError, match=str(tries)):
            persist(work, (0.01, 0.02, 0.03), threading.Event(), lambda error: False, lambda _, wait: told.append(wait))
    else:
        persist(work, (0.01, 0.02, 0.03), threading.Event(), lambda error: False, lambda _, wait: told.append(wait))
    assert len(seen) == tries and told == [0.01, 0.02, 0.03][: tries - 1]
    assert time.monotonic() - begin >= sum(told)


def test_what_cannot_be_mended_is_not_tried_again_and_hurry_cuts_waits_short():
    seen: list[int] = []

    def work() -> None:
        seen.append(1)
        raise PermissionError

    with pytest.raises(PermissionError):
        persist(work, (60.0,), threading.Event(), lambda error: isinstance(error, PermissionError))
    assert len(seen) == 1
    hurry = threading.Event()
    hurry.set()
    with pytest.raises(PermissionError):
        persist(work, (60.0, 60.0), hurry, lambda error: False)
    assert len(seen) == 4
