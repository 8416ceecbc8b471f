"""fit(): what happens when, resuming bit for bit, stopping, and giving up on numbers that are not finite."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_tune.errors import Interrupted, UserError
from sana_tune.progress import Every, Progress
from sana_tune.prompts import Prompt
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.loop import Timed, fit
from sana_tune.train.signals import LeaveNow, Stop
from sana_tune.train.step import StepResult
from sana_tune.train.validate import NoValidator, Validator, pictures_of
from sana_tune.watch.events import Event, Stepped
from sana_tune.watch.metrics import read
from sana_tune.watch.sinks import MetricsSink, Watcher
from tests.train.toys import Course, ToyBatches, differences, make_parts, state_of


class Recorder:
    """Writes down what was said, and does something at a chosen step."""

    def __init__(self, at: int = 0, do: Callable[[], object] = lambda: None):
        self.events: list[Event] = []
        self.at, self.do = at, do

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Stepped) and event.progress.step == self.at:
            self.do()

    def close(self) -> None:
        pass

    @property
    def story(self) -> list[str]:
        return [f"{type(event).__name__} {event.progress.step}" for event in self.events]  # type: ignore[union-attr]


def run(
    output: Path,
    course: Course,
    *,
    resume: str = "latest",
    batches: ToyBatches | None = None,
    recorder: Recorder | None = None,
    validator: Any = None,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[dict[str, Any], Recorder, Progress]:
    recorder = recorder or Recorder()
    parts = make_parts(total_steps=course.total_steps, **(settings or {}))
    with Stop().listening() as stop, Watcher([recorder, MetricsSink(output / "metrics.jsonl")]) as watcher:
        progress = fit(
            course,
            parts,
            batches or ToyBatches(),
            validator or NoValidator(),
            Checkpoints(output),
            watcher,
            stop,
            resume=folders.find(output, resume),
            **more,
        )
    return state_of(parts), recorder, progress


def test_a_run_from_start_to_end(tmp_path: Path):
    exported = []
    batches = ToyBatches()
    course = Course(5, steps_per_epoch=2.0, save_every=Every(2))
    _, recorder, progress = run(
        tmp_path, course, batches=batches, export=lambda progress: exported.append(progress) or "pipeline"
    )
    assert recorder.story == [
        "Started 0", "Validated 0", "Stepped 1", "Stepped 2", "Saved 2", "Stepped 3", "Stepped 4", "Saved 4",
        "Stepped 5", "Saved 5", "Validated 5", "Finished 5",
    ]  # fmt: skip
    assert progress == Progress(5, 2.5, 3 + 2 + 2 + 3 + 2) and exported == [progress]
    assert recorder.events[-1].pipeline == "pipeline"  # type: ignore[union-attr]
    assert [line["epoch"] for line in read(tmp_path / "metrics.jsonl")] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert batches.closed == 1


def test_previews_come_at_the_start_on_the_way_and_at_the_end(tmp_path: Path):
    drawn = []
    pictures = pictures_of({"a": Prompt("a", "b")}, [(8, 8)])

    def draw(picture: Any, progress: Progress, *, seen: bool) -> Any:
        drawn.append(1)

    validator = Validator(tmp_path / "v", pictures, draw, lambda _: b"png")
    _, recorder, _ = run(tmp_path, Course(4, validate_every=Every(2)), validator=validator)
    files = [len(event.files) for event in recorder.events if type(event).__name__ == "Validated"]
    assert files == [1, 2, 2], "the base model has no average yet; the last step's are drawn once"
    assert len(drawn) == 5


def test_pictures_come_by_epochs_too(tmp_path: Path):
    pictures = pictures_of({"a": Prompt("a", "b")}, [(8, 8)])
    validator = Validator(tmp_path / "v", pictures, lambda *_, seen: None, lambda _: b"png", base=False)  # type: ignore[arg-type]
    course = Course(7, steps_per_epoch=2.0, validate_every=Every(epochs=1, after_step=3))
    _, recorder, _ = run(tmp_path, course, validator=validator)
    steps = [event.progress.step for event in recorder.events if type(event).__name__ == "Validated" and event.files]
    assert steps == [4, 6, 7]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("steps", [4, 5])
def test_resuming_is_exact_to_the_bit(tmp_path: Path, accumulation: int, steps: int):
    """2N steps = N, a new process's worth of objects, N: weights, EMA, optimizer, learning rate, metrics."""
    settings = {"scheduler": "cosine", "ema_interval": 2}
    course = Course(2 * steps, steps_per_epoch=3.0, save_every=Every(steps))
    straight, _, progress = run(tmp_path / "a", course, batches=ToyBatches(accumulation), settings=settings)

    stopping = Recorder(at=steps, do=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run(tmp_path / "b", course, batches=ToyBatches(accumulation), recorder=stopping, settings=settings)
    resumed, recorder, again = run(tmp_path / "b", course, batches=ToyBatches(accumulation), settings=settings)
    assert recorder.story[:3] == [f"Started {steps}", f"Validated {steps}", f"Stepped {steps + 1}"]
    assert progress == again and differences(straight, resumed) == []
    times = ("step_s", "data_wait_s", "images_s")
    one, two = (
        [
            {key: value for key, value in line.items() if key not in times}
            for line in read(tmp_path / each / "metrics.jsonl")
        ]
        for each in "ab"
    )
    assert one == two and len(one) == 2 * steps


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path):
    """The steps after the checkpoint are done again, and their lines are not there twice."""

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    course = Course(6, save_every=Every(2))
    straight, _, _ = run(tmp_path / "a", course)
    with pytest.raises(Killed):
        run(tmp_path / "b", course, recorder=Recorder(at=5, do=die))
    resumed, recorder, _ = run(tmp_path / "b", course)
    assert recorder.story[0] == "Started 4" and recorder.events[0].resumed_from == str(tmp_path / "b" / "checkpoint-4")
    assert differences(straight, resumed) == []
    assert [line["step"] for line in read(tmp_path / "b" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_ends(tmp_path: Path, number: signal.Signals):
    recorder = Recorder(at=3, do=lambda: os.kill(os.getpid(), number))
    batches = ToyBatches()
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, Course(10), recorder=recorder, batches=batches)
    assert caught.value.exit_code == 128 + number
    assert recorder.story[-2:] == ["Saved 3", "Stopped 3"] and recorder.events[-1].reason == number.name
    assert batches.closed == 1
    found = folders.find(tmp_path, "latest")
    assert found is not None and found.step == 3


def test_a_signal_while_the_base_pictures_are_drawn_begins_no_step(tmp_path: Path):
    class Interrupting(NoValidator):
        def start(self, parts: Any, progress: Progress) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return super().start(parts, progress)

    recorder = Recorder()
    with pytest.raises(Interrupted) as ended:
        run(tmp_path, Course(4), validator=Interrupting(), recorder=recorder)
    assert ended.value.exit_code == 130
    assert recorder.story[-1] == "Stopped 0" and not any("Stepped" in line for line in recorder.story)
    assert folders.find(tmp_path, "latest") is None, "the next start is a start, with its pictures"


def test_a_signal_at_the_last_step_still_finishes(tmp_path: Path):
    recorder = Recorder(at=2, do=lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path, Course(2), recorder=recorder)
    assert recorder.story[-3:] == ["Saved 2", "Validated 2", "Finished 2"]


def test_a_second_signal_leaves_at_once(tmp_path: Path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    recorder = Recorder(at=3, do=twice)
    with pytest.raises(LeaveNow) as caught:
        run(tmp_path, Course(10), recorder=recorder)
    assert caught.value.exit_code == 130
    assert recorder.story[-1] == "Stepped 3" and folders.find(tmp_path, "latest") is None


def test_a_finished_run_does_no_step(tmp_path: Path):
    course = Course(2)
    first, _, _ = run(tmp_path, course)
    again, recorder, progress = run(tmp_path, course)
    assert recorder.story == ["Started 2", "Validated 2", "Validated 2", "Finished 2"]
    assert progress.step == 2 and differences(first, again) == []
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_a_finished_run_can_be_made_longer(tmp_path: Path):
    run(tmp_path, Course(2))
    _, recorder, _ = run(tmp_path, Course(4))
    assert recorder.story[0] == "Started 2" and recorder.story[-1] == "Finished 4"


def test_single_bad_steps_are_skipped_and_told(tmp_path: Path):
    _, recorder, progress = run(tmp_path, Course(6), batches=ToyBatches(bad_steps=(1, 3)), max_bad_steps=2)
    skipped = [event.progress.step for event in recorder.events if isinstance(event, Stepped) and event.skipped]
    assert skipped == [2, 4] and progress.step == 6
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 4] and lines[1]["loss"] is None


def test_too_many_bad_steps_end_the_run(tmp_path: Path):
    with pytest.raises(UserError, match="3 steps in a row") as caught:
        run(tmp_path, Course(9, save_every=Every(2)), batches=ToyBatches(bad_steps=(2, 3, 4)), max_bad_steps=3)
    assert caught.value.problems[0].where == "step 5" and "cache verify" in caught.value.problems[0].fix
    found = folders.find(tmp_path, "latest")
    assert found is not None and found.step == 4


def test_data_that_end_early_are_not_taken_for_the_end(tmp_path: Path):
    class Short(ToyBatches):
        def steps(self, first_step: int, total_steps: int):
            return super().steps(first_step, total_steps - 1)

    with pytest.raises(RuntimeError, match="ended before the last one"):
        run(tmp_path, Course(3), batches=Short())


def test_waiting_for_data_is_measured_and_part_of_the_step():
    def slow():
        time.sleep(0.05)
        yield []

    steps = Timed(slow())
    next(steps)
    time.sleep(0.02)
    event = steps.event(Progress(1), StepResult(0.5, 0.1, 1e-5, 4, skipped=False))
    assert 0.05 <= event.data_wait_s < event.step_s and event.step_s >= 0.07
    assert (event.loss, event.grad_norm, event.learning_rate, event.images) == (0.5, 0.1, 1e-5, 4)
    steps.close()
    Timed(iter([])).close()
