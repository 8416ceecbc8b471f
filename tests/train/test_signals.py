"""Stopping: at once while nothing is at stake, after the step while training, and handlers given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from sana_tune import ranks
from sana_tune.errors import Interrupted
from sana_tune.train.signals import SIGNALS, LeaveNow, Stop


@pytest.fixture(autouse=True)
def _handlers_are_given_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_loading_a_signal_leaves_at_once(number: signal.Signals):
    with pytest.raises(LeaveNow) as caught, Stop().listening():
        send(number)
    assert caught.value.exit_code == 128 + number
    assert isinstance(caught.value, KeyboardInterrupt)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_training_the_first_is_noted(number: signal.Signals, capfd: pytest.CaptureFixture[str]):
    stop = Stop()
    with stop.listening(), stop.deferred():
        assert not stop.requested and stop.reason == ""
        send(number)
        assert stop.requested and stop.reason == number.name
    assert "once more leaves at once" in capfd.readouterr().err
    assert stop.interrupted().exit_code == 128 + number


def test_the_second_leaves_at_once():
    stop = Stop()
    with pytest.raises(LeaveNow) as caught, stop.listening(), stop.deferred():
        send()
        send(signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_after_deferring_signals_leave_at_once_again():
    stop = Stop()
    with pytest.raises(LeaveNow), stop.listening():
        with stop.deferred():
            pass
        send()


def test_handlers_come_back_after_an_error():
    with pytest.raises(RuntimeError), Stop().listening():
        raise RuntimeError


def test_a_third_signal_is_not_caught():
    code = """
import os, signal, sys
from sana_tune import ranks
from sana_tune.train.signals import LeaveNow, Stop
number, ranks.REPEATED_S = int(sys.argv[1]), 0.0
stop = Stop()
with stop.listening(), stop.deferred():
    os.kill(os.getpid(), number)
    try:
        os.kill(os.getpid(), number)
    except LeaveNow:
        os.kill(os.getpid(), number)
"""
    for number in SIGNALS:
        command = [sys.executable, "-c", code, str(int(number))]
        assert subprocess.run(command, capture_output=True).returncode == -number


def test_a_sigterm_right_after_another_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """A scheduler sends it to all processes of a job, and the launcher hands it on."""
    stop = Stop()
    with stop.listening(), stop.deferred():
        for _ in range(3):
            send(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(LeaveNow):
            send()
    with pytest.raises(LeaveNow), Stop().listening():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)  # while it leaves
    monkeypatch.setattr(ranks, "REPEATED_S", 0.0)
    with pytest.raises(LeaveNow), Stop().listening() as later, later.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_another_process_was_sent_comes_here_too_and_is_the_same(number: signal.Signals):
    stop = Stop()
    with pytest.raises(LeaveNow), stop.listening(), stop.deferred():
        stop.request(number)
        send(number)
        assert stop.requested
        send()
        send()


def test_a_stop_by_hand():
    stop = Stop()
    stop.request()
    assert stop.requested and stop.interrupted().exit_code == 143
    assert isinstance(stop.interrupted(), Interrupted)


def test_nobody_asked():
    with pytest.raises(RuntimeError):
        Stop().interrupted()


def test_on_another_thread_nothing_is_installed():
    seen = []

    def work() -> None:
        with Stop().listening() as stop, stop.deferred():
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
