"""Patience: how often, how long, and what is said when it ends."""

from __future__ import annotations

import threading
import time

import pytest

from sana_tune.data.remote import GaveUp, Passing, Patience, Rest, persist

PATIENCE = Patience(tries=4, first_wait_s=1, longest_wait_s=3)


class Moody:
    """Fails with these, then answers."""

    def __init__(self, *failures: Exception):
        self.failures, self.waits = list(failures), []

    def __call__(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def test_waits_double_up_to_the_longest():
    moody, waits = Moody(*[Passing("busy")] * 3), []
    assert persist(moody, PATIENCE, waits.append) == "answer" and waits == [1, 2, 3]
    assert [PATIENCE.wait_s(failures) for failures in (1, 2, 3, 50)] == [1, 2, 3, 3]


def test_the_last_try_is_the_last():
    moody, waits = Moody(*[Passing("busy")] * 9), []
    with pytest.raises(GaveUp, match=r"^busy \(tried 4 times\)$") as error:
        persist(moody, PATIENCE, waits.append)
    assert len(waits) == 3 and (error.value.reason, error.value.tries) == ("busy", 4)
    with pytest.raises(GaveUp, match=r"^busy$"):
        persist(Moody(Passing("busy")), Patience(tries=1), waits.append)


def test_what_a_server_asks_for_is_waited_but_not_more_than_there_is():
    waits: list[float] = []
    assert persist(Moody(Passing("busy", 2.5)), PATIENCE, waits.append) == "answer" and waits == [2.5]
    with pytest.raises(GaveUp, match="asks for 9 s of patience"):
        persist(Moody(Passing("busy", 9)), PATIENCE, waits.append)
    assert len(waits) == 1


def test_other_errors_are_not_tried_again():
    with pytest.raises(KeyError):
        persist(Moody(KeyError("x")), PATIENCE, lambda _: pytest.fail("waited"))


def test_a_hurry_ends_all_waits():
    rest, begun = Rest(), time.monotonic()
    threading.Timer(0.05, rest.hurry).start()
    with pytest.raises(GaveUp, match="it was interrupted"):
        persist(Moody(Passing("busy")), Patience(first_wait_s=30), rest)
    with pytest.raises(GaveUp):
        rest(30)
    assert time.monotonic() - begun < 5
