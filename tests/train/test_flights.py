"""Checkpoints that are written while training goes on: as exact, told, waited for, given up, and killed."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.errors import Interrupted, UserError
from sana_tune.progress import Every, Progress
from sana_tune.saving import Keeping
from sana_tune.train import folders
from sana_tune.train.checkpoint import THREAD, Checkpoints
from sana_tune.train.loop import fit
from sana_tune.train.room import Room
from sana_tune.train.signals import LeaveNow, Stop
from sana_tune.train.step import Parts
from sana_tune.train.validate import NoValidator
from sana_tune.watch.events import Event, Noticed, Saved, Stepped
from sana_tune.watch.sinks import Watcher
from tests.train.test_checkpoint import names, newest, trained
from tests.train.toys import Course, ToyBatches, differences, files_of, make_parts, state_of

KILLS, KILLS_IN_FULL = 20, 100


class Writes:
    """Does something in the thread that writes, whenever it opens a file of this end in an output folder."""

    now: Writes | None = None
    hooked = False

    def __init__(self, output: Path, end: str, do: Callable[[], object]):
        self.begin, self.end, self.do = f"{output}/.checkpoint-", end, do

    def __enter__(self) -> Writes:
        if not Writes.hooked:
            sys.addaudithook(Writes.hear)  # there is no way to take one away
            Writes.hooked = True
        Writes.now = self
        return self

    def __exit__(self, *exception: object) -> None:
        Writes.now = None

    @staticmethod
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        self = Writes.now
        if event == "open" and self is not None and isinstance(arguments[0], (str, os.PathLike)):
            path = str(arguments[0])
            if path.startswith(self.begin) and path.endswith(self.end):
                self.do()


def once(do: Callable[[], object]) -> Callable[[], object]:
    """It, and nothing from the second time on."""
    turns = iter([do])
    return lambda: next(turns, lambda: None)()


@contextlib.contextmanager
def held_up(output: Path) -> Iterator[threading.Event]:
    """Writing stops before the optimizer's state until the event is set."""
    go = threading.Event()
    with Writes(output, "/optimizer.pt", lambda: go.wait(20)):
        try:
            yield go
        finally:
            go.set()


def until(condition: Callable[[], object]) -> None:
    """Wait until it holds; AssertionError after a long time."""
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def background(output: Path, keeping: Keeping | None = None, **more: Any) -> Checkpoints:
    return Checkpoints(output, keeping, background=True, **more)


def run(
    output: Path,
    steps: int,
    *,
    heard: Callable[[Event], object] = lambda event: None,
    in_background: bool = True,
    parts: Parts | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Train to a step with a checkpoint after each, as a run does it."""

    class Sink:
        def emit(self, event: Event) -> None:
            heard(event)

        def close(self) -> None:
            pass

    parts = parts or make_parts(total_steps=10_000)
    checkpoints = Checkpoints(output, Keeping(2), background=in_background, **more)
    with Stop().listening() as stop, Watcher([Sink()]) as watcher:
        course, resume = Course(steps, save_every=Every(1)), folders.find(output, "latest")
        fit(course, parts, ToyBatches(), NoValidator(), checkpoints, watcher, stop, resume=resume)
    return state_of(parts)


# ---- exact ----


@pytest.mark.parametrize("optimizer", ["optimi-adamw", "bnb-lion8bit", "came"])
def test_written_in_the_background_is_byte_for_byte_what_waiting_writes(tmp_path: Path, optimizer: str):
    found = {}
    for name, in_background in (("waited", False), ("background", True)):
        parts = make_parts(optimizer=optimizer, total_steps=10_000)
        run(tmp_path / name, 4, in_background=in_background, parts=parts)
        found[name] = files_of(tmp_path / name)
    assert found["waited"].keys() == found["background"].keys() and len(found["waited"]) == 14
    assert [name for name, data in found["waited"].items() if data != found["background"][name]] == []


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path: Path):
    parts, checkpoints = trained(), background(tmp_path)
    before = state_of(parts)
    with held_up(tmp_path) as go, checkpoints.telling(lambda event: None, lambda: False):
        checkpoints.save(parts, Progress(3))
        parts.fence.wait()  # as a step does before it moves anything
        with torch.no_grad():
            for tensor in (*parts.trained, *parts.ema.state_dict().values()):
                tensor.fill_(9.0)
        parts.optimizer.state.clear()
        until(lambda: list(tmp_path.glob(".checkpoint-3.tmp*")))
        go.set()
    other = make_parts()
    Checkpoints(tmp_path).restore(other, newest(tmp_path))
    assert differences(before, state_of(other)) == []


# ---- told and waited for ----


def test_it_is_told_once_it_is_complete_and_a_second_one_waits(tmp_path: Path):
    parts, checkpoints, told = trained(1), background(tmp_path), list[Any]()
    with held_up(tmp_path) as go, checkpoints.telling(told.append, lambda: False):
        checkpoints.save(parts, Progress(1))
        checkpoints.poll()
        assert told == [] and not (tmp_path / "checkpoint-1").exists()
        threading.Timer(0.1, go.set).start()
        began_s = time.monotonic()
        checkpoints.save(parts, Progress(2))
        assert time.monotonic() > began_s + 0.05 and [event.progress.step for event in told] == [1]
        held = checkpoints.held()
        assert held is not None and held.step == 2 and [event.progress.step for event in told] == [1, 2]
        checkpoints.poll()
    assert all(isinstance(event, Saved) for event in told) and len(told) == 2


def test_polling_tells_without_waiting(tmp_path: Path):
    parts, checkpoints, told = trained(1), background(tmp_path), list[Any]()
    with checkpoints.telling(told.append, lambda: False):
        checkpoints.save(parts, Progress(1))
        until(lambda: checkpoints.poll() or told)
        assert [event.progress.step for event in told] == [1] and newest(tmp_path).step == 1


def test_a_run_saves_every_step_and_tells_all_before_its_end(tmp_path: Path):
    events = list[Any]()
    run(tmp_path, 5, heard=events.append)
    steps = [event.progress.step for event in events if isinstance(event, Saved)]
    assert steps == [1, 2, 3, 4, 5] and type(events[-1]).__name__ == "Finished"
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


# ---- going wrong ----


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may get larger: writing fails, and not for want of room on the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_ends_the_run_with_a_message(tmp_path: Path):
    """At the next save at the latest; the checkpoints before it stay, and nothing half done."""
    run(tmp_path, 2)

    def at(event: Event) -> None:
        if isinstance(event, Stepped) and event.progress.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):
        with pytest.raises(UserError, match=r"checkpoint could not be written: .*File too large") as caught:
            run(tmp_path, 9, heard=at)
    assert "checkpoint-3" in caught.value.problems[0].where
    assert names(tmp_path) == ["checkpoint-2"], "the one before went before it was written, as always"
    assert folders.damage(newest(tmp_path)) == [] and newest(tmp_path).step == 2


def test_a_failed_last_write_is_no_success(tmp_path: Path):
    parts, checkpoints = trained(1), background(tmp_path)
    with largest_file(20_000), pytest.raises(UserError, match="could not be written"):
        with checkpoints.telling(lambda event: None, lambda: False):
            checkpoints.save(parts, Progress(1))
    assert names(tmp_path) == []


def test_another_error_is_not_hidden_by_one_of_the_writer(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    parts, checkpoints = trained(1), background(tmp_path)
    with largest_file(20_000), pytest.raises(ZeroDivisionError), caplog.at_level("ERROR", "sana_tune"):
        with checkpoints.telling(lambda event: None, lambda: False):
            checkpoints.save(parts, Progress(1))
            raise ZeroDivisionError
    assert "checkpoint-1 could not be written" in caplog.text


def test_after_another_error_the_write_is_finished(tmp_path: Path):
    parts, checkpoints, told = trained(1), background(tmp_path), list[Any]()
    with held_up(tmp_path) as go, pytest.raises(ZeroDivisionError):
        with checkpoints.telling(told.append, lambda: False):
            checkpoints.save(parts, Progress(1))
            threading.Timer(0.05, go.set).start()
            raise ZeroDivisionError
    assert newest(tmp_path).step == 1 and [event.progress.step for event in told] == [1]


# ---- asked to stop ----


def test_ctrl_c_while_it_is_written_finishes_saves_and_goes_on_later(tmp_path: Path):
    straight = run(tmp_path / "straight", 6)
    with Writes(tmp_path / "cut", "/optimizer.pt", once(lambda: os.kill(os.getpid(), signal.SIGINT))):
        with pytest.raises(Interrupted) as ended:
            run(tmp_path / "cut", 6)
    assert ended.value.exit_code == 130
    stopped = newest(tmp_path / "cut")
    assert stopped.step in (1, 2) and folders.damage(stopped) == []
    assert all(name.startswith("checkpoint-") for name in names(tmp_path / "cut"))
    assert differences(straight, run(tmp_path / "cut", 6)) == []


def test_a_second_signal_gives_the_write_up_at_once(tmp_path: Path):
    """SIGINT and SIGTERM right after each other: the second one leaves, and what was half written is gone."""
    run(tmp_path, 2)

    def twice() -> None:
        """And the thread is held up in a file until the second one is heard."""
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: signal.getsignal(signal.SIGINT) == signal.SIG_DFL)
        time.sleep(0.2)

    with Writes(tmp_path, "/optimizer.pt", once(twice)), pytest.raises(LeaveNow):
        run(tmp_path, 9)
    assert names(tmp_path) == ["checkpoint-2"] and folders.damage(newest(tmp_path)) == []
    assert THREAD not in {each.name for each in threading.enumerate()}, "nothing goes on writing"


@pytest.mark.parametrize("started", [False, True])
def test_a_signal_while_the_thread_starts_gives_the_write_up(tmp_path: Path, monkeypatch, started: bool):
    """The moment at which Python listens best: it waits there until the thread runs."""
    run(tmp_path, 2)
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == THREAD:
            if started:
                start(thread)
            raise LeaveNow(signal.SIGTERM)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(LeaveNow):
        run(tmp_path, 9)
    monkeypatch.undo()
    assert THREAD not in {each.name for each in threading.enumerate()}, "nothing goes on writing"
    run(tmp_path, 4)
    assert names(tmp_path)[-1] == "checkpoint-4" and folders.damage(newest(tmp_path)) == []


# ---- room on the disk ----


def test_too_little_room_ends_the_run_where_that_is_asked_for(tmp_path: Path):
    run(tmp_path, 2)
    room = Room(threshold="99.99%", action="stop")
    with pytest.raises(UserError, match=r"are free, and checkpoint-3 needs .* \(disk_low_threshold 99.99%\)"):
        run(tmp_path, 9, room=room)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_ctrl_c_leaves_a_run_that_waits_for_room(tmp_path: Path):
    run(tmp_path, 2)
    events = list[Any]()

    def heard(event: Event) -> None:
        events.append(event)
        if isinstance(event, Noticed) and "training waits until there is room" in event.message:
            os.kill(os.getpid(), signal.SIGINT)

    began_s = time.monotonic()
    with pytest.raises(Interrupted) as ended:
        run(tmp_path, 9, heard=heard, room=Room(threshold="99.99%", look_s=30.0))
    assert ended.value.exit_code == 130 and time.monotonic() < began_s + 20
    said = [event.message for event in events if isinstance(event, Noticed)]
    assert len(said) == 2 and "Left without checkpoint-3: the newest is of step 2" in said[1]
    assert type(events[-1]).__name__ == "Stopped" and names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_waiting_run_looks_again_and_repeats_itself_rarely(tmp_path: Path):
    """A threshold that another thread takes away stands in for room that is made."""
    parts, told, looks = trained(1), list[Any](), 0

    def heard(event: Event) -> None:
        told.append(event)

    class Slowly(Room):
        """There is room at the fifth look."""

        def lack(self, folder: Path, size_bytes: int, freed_bytes: int = 0) -> Any:
            nonlocal looks
            looks += 1
            return super().lack(folder, size_bytes if looks >= 5 else 10**18, freed_bytes)

    checkpoints = Checkpoints(tmp_path, room=Slowly(look_s=0.01, tell_s=0.02))
    with checkpoints.telling(heard, lambda: False):
        checkpoints.save(parts, Progress(1))
    messages = [event.message for event in told if isinstance(event, Noticed)]
    assert looks == 5 and 2 <= len(messages) <= 4 and "There is room again" in messages[-1]
    assert isinstance(told[-1], Saved) and newest(tmp_path).step == 1


@pytest.mark.parametrize("in_background", [True, False])
def test_a_disk_that_takes_no_more_though_it_tells_of_room(tmp_path: Path, in_background: bool):
    """A quota, say: what was begun goes, it is tried again after a while, and the same state is written then."""
    failures = [errno.EDQUOT, errno.ENOSPC]

    def fail() -> None:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))

    told, straight = list[Any](), run(tmp_path / "straight", 3)
    room = Room(retry_s=0.05, look_s=30.0)
    with Writes(tmp_path / "quota", "/optimizer.pt", fail):
        state = run(tmp_path / "quota", 3, heard=told.append, in_background=in_background, room=room)
    said = [event.message for event in told if isinstance(event, Noticed)]
    assert len(said) == 4 and "the disk took no more" in said[0] and "There is room again" in said[1]
    assert [event.progress.step for event in told if isinstance(event, Saved)] == [1, 2, 3]
    assert differences(straight, state) == []
    one, two = files_of(tmp_path / "straight"), files_of(tmp_path / "quota")
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] == []


# ---- killed ----


def killed_while_writing(output: Path, luck: random.Random, write_s: float) -> bool:
    """Train in a process of its own that is killed, aimed at a write. Whether one was half done then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: a fork with threads around
        child = os.fork()
    if child == 0:
        try:
            run(output, 10_000)
        finally:
            os._exit(3)
    nth, begun = luck.randint(1, 3), set[str]()
    end_s = time.monotonic() + 60
    while len(begun) < nth and time.monotonic() < end_s:
        begun.update(name for name in os.listdir(output) if f".tmp-{child}-" in name)
        time.sleep(0.0005)
    time.sleep(luck.uniform(0.0, write_s))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was killed, it did not fail"
    return any(f".tmp-{child}-" in name for name in os.listdir(output))


def test_twenty_kills_while_it_is_written(tmp_path: Path, full: bool):
    """The newest complete checkpoint always verifies and is never lost; what goes on from it ends bit for bit alike."""
    output, luck, events = tmp_path / "output", random.Random(4), list[Any]()
    output.mkdir()
    run(tmp_path / "timed", 4, heard=events.append)
    write_s = min(event.duration_s for event in events if isinstance(event, Saved))
    landed = reached = 0
    for _ in range(KILLS_IN_FULL if full else KILLS):
        landed += killed_while_writing(output, luck, write_s)
        complete = folders.list_complete(output)
        assert len(complete) <= 3
        assert reached == 0 or complete, "a checkpoint was there and is gone"
        if complete:
            assert folders.damage(complete[-1]) == []
            assert complete[-1].step >= reached
            reached = complete[-1].step
    wanted = KILLS_IN_FULL if full else KILLS
    print(f"{landed} of {wanted} kills landed inside a write; {reached} steps were saved between them")
    assert landed >= wanted * 0.3 and reached >= 5, "on a busy machine it is seen late that one began"
    assert differences(run(tmp_path / "straight", reached + 2), run(output, reached + 2)) == []
    assert all(name.startswith("checkpoint-") for name in names(output))
