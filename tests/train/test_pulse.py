"""Whether other processes live: those of this machine by their ids, those of others by their beats."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch.distributed as dist

from sana_tune.train import pulse
from sana_tune.train.pulse import Place, Pulse


@pytest.fixture
def store() -> dist.Store:
    """As the processes of a run have one."""
    return dist.PrefixStore("sana_tune", dist.HashStore())


def put(store: dist.Store, rank: int, place: Place) -> None:
    store.set(f"place/{rank}", json.dumps(asdict(place)))
    store.set(f"pulse/{rank}", "0")


def test_a_process_of_this_machine_is_known_to_have_ended_at_once(store: dist.Store):
    own = Pulse(0, store)
    assert own.death(1) is None, "it has not begun"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    put(store, 1, replace(Place.own(), pid=child.pid))
    assert own.death(1) is None and own.death(0) is None
    child.kill()
    end_s = time.monotonic() + 10
    while not (told := own.death(1)):  # though nobody has asked for its exit code yet: it is a zombie
        assert time.monotonic() < end_s
    assert told == f"rank 1 (process {child.pid}) has ended"
    child.wait()
    assert own.death(1) == told
    own.end()


def test_one_of_another_machine_lives_while_its_pulse_beats(store: dist.Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pulse, "EVERY_S", 0.01)
    monkeypatch.setattr(pulse, "SILENT_S", 0.5)
    own, other = Pulse(0, store), Pulse(1, store)
    put(store, 1, Place("node7", "its own", 4))

    def told_within(seconds: float) -> str | None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if told := own.death(1):
                return told
            time.sleep(0.01)
        return None

    assert told_within(1.2) is None
    other.end()
    assert told_within(5) == "rank 1 (process 4 on node7) shows no sign of life for 0 min"
    own.end()
    before = store.get("pulse/0")
    time.sleep(0.1)
    assert store.get("pulse/0") == before and int(before) > 10


def test_a_store_that_nobody_holds_any_more_keeps_no_run_from_being_told(monkeypatch: pytest.MonkeyPatch):
    """To clone torch's store is to connect to it: with the process that held it gone, that is tried for 90 minutes."""

    class Deserted(dist.HashStore):
        def clone(self) -> Deserted:
            trying.set()
            given_up.wait()
            raise dist.DistNetworkError("timed out")

    trying, given_up = threading.Event(), threading.Event()
    held = Deserted()
    own = Pulse(0, held)
    assert trying.wait(10)
    put(held, 1, replace(Place.own(), pid=2**22 + 1))
    assert own.death(1) == f"rank 1 (process {2**22 + 1}) has ended"
    given_up.set()
    own.end()
    assert not any(thread.name == "pulse" for thread in threading.enumerate())


def test_a_store_that_is_gone_ends_the_beats_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    class Gone(dist.HashStore):
        def clone(self) -> Gone:
            return self

    def fail(*arguments: object) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(pulse, "EVERY_S", 0.01)
    held = Gone()
    own = Pulse(0, held)
    monkeypatch.setattr(Gone, "set", fail, raising=False)
    end_s = time.monotonic() + 5
    while any(thread.name == "pulse" for thread in threading.enumerate()):
        assert time.monotonic() < end_s
    own.end()
    assert capfd.readouterr().err == ""
