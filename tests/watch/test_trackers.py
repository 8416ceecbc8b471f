"""Trackers, the real ones: wandb offline and TensorBoard's files; and one that fails or is slow."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from sana_tune.progress import Progress
from sana_tune.watch.events import Event, Failed, Finished, Measured, Saved, Started, Stepped, Stopped, Validated
from sana_tune.watch.trackers import (
    Pictures,
    RunInfo,
    TensorBoard,
    TrackerSink,
    Wandb,
    tracker_problems,
    tracker_sinks,
)
from tests.watch.wandb_files import read_runs

DONE = Progress(4, 1.0, 16)


def stepped(step: int, *, loss: float = 0.5) -> Stepped:
    return Stepped(Progress(step, step / 4, 4 * step), loss, 1e-5, 0.25, 0.5, 0.0, 4, memory_bytes=2_000_000_000)


def info(folder: Path, name: str = "rex") -> RunInfo:
    return RunInfo("dogs", name, "abc123", folder, {"learning_rate": 1e-5, "webhook_config": "•••"})


def picture(folder: Path, name: str = "step_4_zib_0_64x32.png") -> Path:
    path = folder / name
    Image.new("RGB", (64, 32), "red").save(path)
    return path


def run(sink: TrackerSink, *events: Event) -> None:
    for event in events:
        sink.emit(event)
    sink.close()


def test_wandb_offline_keeps_curves_pictures_scores_and_settings_and_goes_on(tmp_path: Path):
    """Two parts of one run, with the real library; the second goes back by a step."""
    first = TrackerSink("wandb", Wandb(), info(tmp_path))
    pictures = Validated(DONE, (str(picture(tmp_path)),))
    run(first, Started(Progress(), 8, 4.0), *map(stepped, (1, 2, 3, 4)), pictures, Stopped(DONE, "SIGINT"))
    second = TrackerSink("wandb", Wandb(), info(tmp_path))
    scores = Measured(DONE, {"clip/raw": 0.31, "held_out/raw": 0.9})
    run(second, Started(Progress(3), 8, 4.0, "o/checkpoint-3"), stepped(4), scores, Finished(DONE))
    one, two = read_runs(tmp_path)
    for kept in (one, two):
        assert (kept.project, kept.name, kept.id) == ("dogs", "rex", "abc123")
    assert one.config["learning_rate"] == 1e-5 and one.config["webhook_config"] == "•••"
    assert [line["step"] for line in one.history] == [1, 2, 3, 4, 4]
    assert one.history[0]["loss"] == 0.5 and one.history[0]["lr"] == 1e-5 and one.history[0]["memory_gb"] == 2.0
    shown = [one.history[-1][f"validation/zib_0_64x32.{part}"] for part in ("_type", "width", "height")]
    assert shown == ["image-file", 64, 32] and len(one.files) == 1
    assert [line["step"] for line in two.history] == [4, 4]
    assert two.history[1]["clip/raw"] == 0.31 and two.history[1]["held_out/raw"] == 0.9
    assert (one.exit_code, two.exit_code) == (255, 0)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    values = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    for tag in found.Tags()["images"]:
        for event in found.Images(tag):
            size = Image.open(io.BytesIO(event.encoded_image_string)).size
            assert size == (event.width, event.height)
            values.setdefault(tag, []).append((event.step, size[0]))
    return values


def test_tensorboards_files_hold_curves_pictures_and_scores_and_go_on(tmp_path: Path):
    first = TrackerSink("tensorboard", TensorBoard(), info(tmp_path, "my rex"))
    pictures = Validated(DONE, (str(picture(tmp_path)), str(tmp_path / "gone_64x64.png")))
    run(first, Started(Progress(), 8, 4.0), *map(stepped, (1, 2, 3, 4)), pictures, Stopped(DONE, "SIGINT"))
    second = TrackerSink("tensorboard", TensorBoard(), info(tmp_path, "my rex"))
    went_on = [stepped(step, loss=0.25) for step in (3, 4)]
    run(second, Started(Progress(2), 8, 4.0, "o/checkpoint-2"), *went_on, Measured(DONE, {"clip/raw": 0.5}))
    found = scalars(tmp_path / "my-rex")
    assert found["loss"] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)], "one curve, without the part that was left"
    assert found["clip/raw"] == [(4, 0.5)] and found["memory_gb"][0] == (1, 2.0)
    assert found.get("validation/zib_0_64x32", []) == [], "drawn in the course that was left"
    run(TrackerSink("tensorboard", TensorBoard(), info(tmp_path, "other")), Started(Progress(), 8, 4.0), pictures)
    assert scalars(tmp_path / "other")["validation/zib_0_64x32"] == [(4, 64.0)]


class Fake:
    """A tracker that keeps what it gets, breaks at a step, or waits."""

    def __init__(self, breaks_at: int | None = None, gate: threading.Event | None = None):
        self.steps: list[int] = []
        self.code: int | None = None
        self.breaks_at, self.gate = breaks_at, gate

    def start(self, info: RunInfo, step: int) -> None:
        if self.gate is not None:
            self.gate.wait()

    def log(self, step: int, values: dict, pictures: Pictures = ()) -> None:
        if step == self.breaks_at:
            raise ConnectionError("the server is gone\nand more")
        self.steps.append(step)

    def finish(self, code: int) -> None:
        self.code = code


def test_a_tracker_that_fails_is_told_once_and_hears_no_more(tmp_path: Path, caplog):
    fake = Fake(breaks_at=2)
    run(
        TrackerSink("wandb", fake, info(tmp_path)),
        Started(Progress(), 8, 4.0),
        *map(stepped, (1, 2, 3)),
        Finished(DONE),
    )
    assert fake.steps == [1] and fake.code is None
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "wandb failed and is switched off; the run goes on: ConnectionError: the server is gone" in record.message


def test_a_slow_tracker_costs_the_run_nothing_and_is_left_behind_at_the_end(tmp_path: Path, caplog):
    gate = threading.Event()
    sink = TrackerSink("wandb", Fake(gate=gate), info(tmp_path), finish_s=0.1)
    begin = time.perf_counter()
    sink.emit(Started(Progress(), 200, 4.0))
    for step in range(1, 201):
        sink.emit(stepped(step))
    assert time.perf_counter() - begin < 5
    sink.close()
    gate.set()
    assert "has not taken everything after 0 s" in caplog.records[0].message


@pytest.mark.parametrize(("end", "code"), [(Finished(DONE), 0), (Failed("no room"), 1), (Stopped(DONE), 255)])
def test_the_end_of_the_run_is_told(tmp_path: Path, end: Event, code: int):
    fake = Fake()
    run(TrackerSink("wandb", fake, info(tmp_path)), Started(Progress(), 8, 4.0), Saved(DONE, "o", 1.0), end)
    assert fake.code == code


def test_a_run_that_never_began_opens_nothing(tmp_path: Path):
    fake = Fake()
    run(TrackerSink("wandb", fake, info(tmp_path)), Failed("no pictures"))
    assert fake.code is None


def test_sinks_of_what_is_asked_for_import_nothing(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from sana_tune.watch.trackers import *\n"
        "sinks = tracker_sinks('wandb,tensorboard', RunInfo('p', 'n', 'i', Path('x'), {}))\n"
        "assert len(sinks) == 2 and not tracker_sinks('none', RunInfo('p', 'n', 'i', Path('x'), {}))\n"
        "tracker_problems('wandb,tensorboard')\n"
        "print([name for name in ('wandb', 'tensorboard', 'torch') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_what_a_tracker_needs_is_told_before_the_run(tmp_path: Path):
    home = {"HOME": str(tmp_path)}
    (problem,) = tracker_problems("wandb,tensorboard", home)
    assert "nobody is logged in" in problem.what and "wandb login" in problem.fix
    for environ in ({"WANDB_MODE": "offline"}, {"WANDB_API_KEY": "x"}, {"WANDB_MODE": "disabled"}):
        assert tracker_problems("wandb", {**home, **environ}) == []
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 123\n")
    assert tracker_problems("wandb", home) == [] == tracker_problems("none", {})
    assert tracker_problems("wandb", {**home, "WANDB_BASE_URL": "https://wandb.example.com"})


def test_tensorboard_that_is_not_installed_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    (problem,) = tracker_problems("tensorboard", {})
    assert "pip install 'sana_tune[tensorboard]'" in problem.fix


def test_only_what_is_asked_for(tmp_path: Path):
    assert [sink._name for sink in tracker_sinks("tensorboard", info(tmp_path))] == ["tensorboard"]
