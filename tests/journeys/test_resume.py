"""A run that was cut, wherever and however, ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config.load import Loaded
from sana_tune.errors import Interrupted
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.run import run
from sana_tune.train import folders
from sana_tune.watch.events import CacheProgress, Event, Finished, Saved, Started, Stepped, Stopped
from sana_tune.watch.metrics import read as read_metrics
from tests.journeys.kit import (
    Child,
    Heard,
    cache_of,
    differences,
    metrics_of,
    pictures,
    pipeline_of,
    small_run,
    state_of,
)

STEPS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures, and the caches that the runs of this module share."""
    folder = tmp_path_factory.mktemp("resume")
    pictures(folder / "squares", 5, variants=3)
    pictures(folder / "mixed", 3, variants=2, seed=1)
    pictures(folder / "mixed", 3, (64, 32), variants=2, seed=2, name="wide")
    return folder


SQUARES = {"instance_data_dir": "squares"}
# 2 buckets of 3 pictures, each seen twice an epoch: 6 micro-batches.
MIXED = {"instance_data_dir": "mixed", "repeats": 1, "probability": 0.5}

# 5 squares in batches of 2 are 3 micro-batches an epoch, so that 8 steps pass several ends of epochs; with
# accumulation 2 most ends fall inside a step.
SCENARIOS: Mapping[str, tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any]]] = {
    "plain": ((SQUARES,), {}),
    "bf16 weights": ((SQUARES,), {"weights_dtype": "bf16"}),
    "8-bit, released": (
        (SQUARES,),
        {
            "weights_dtype": "bf16",
            "optimizer": "bnb-lion8bit",
            "optimizer_release_gradients": True,
            "max_grad_norm": 0.0,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine_with_restarts",
            "lr_num_cycles": 2,
            "lr_scale_sqrt": True,
        },
    ),
    "CAME, two passes": (
        (SQUARES,),
        {"optimizer": "came", "optimizer_release_gradients": True, "lr_scheduler": "inverse_sqrt", "use_ema": True},
    ),
    "accumulation": ((SQUARES,), {"gradient_accumulation_steps": 2, "use_ema": True}),
    "everything": (
        (SQUARES, MIXED),
        {
            "gradient_accumulation_steps": 2,
            "caption_dropout_probability": 0.3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "optimizer": "torch-adamw",
            "use_ema": True,
            "ema_update_interval": 3,
            "gradient_checkpointing": True,
            "gradient_checkpointing_interval": 2,
        },
    ),
}


class Course:
    """A scenario in a folder of its own, with the caches of `home`."""

    def __init__(self, home: Path, folder: Path, scenario: str = "everything"):
        datasets, self.settings = SCENARIOS[scenario]
        self.datasets = [{**each, "instance_data_dir": str(home / str(each["instance_data_dir"]))} for each in datasets]
        self.folder, self.cache = folder, home / "cache"

    def loaded(self, **settings: Any) -> Loaded:
        places = {"cache_dir": str(self.cache)}
        # Waiting for what is written, so that it is known at which event it stands; test_saves.py does not wait.
        given = {"max_train_steps": STEPS, "checkpoint_step_interval": 3, "checkpoints_total_limit": 0,
                 "checkpoint_writing": "wait"}  # fmt: skip
        return small_run(self.folder, *self.datasets, **{**places, **given, **self.settings, **settings})

    def run(
        self, *, restart: bool = False, then: Callable[[Event], None] = lambda event: None, **settings: Any
    ) -> Heard:
        """Run to the end in this process."""
        heard = Heard(then)
        run(self.loaded(**settings), sinks=[heard], restart=restart)
        return heard

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def result(self) -> dict[str, Any]:
        """All that must be the same at the end: every byte of the last checkpoint, the pipeline, the metrics' lines."""
        state, pipeline = state_of(self.output / f"checkpoint-{STEPS}"), pipeline_of(self.output)
        lines = {f"line {number}": line for number, line in enumerate(metrics_of(self.output), start=1)}
        return {**state, **pipeline, **lines}


@pytest.fixture(scope="module")
def straight(home: Path) -> Callable[[str], dict[str, Any]]:
    """The result of a scenario that nothing disturbed; each is run once."""
    results: dict[str, dict[str, Any]] = {}

    def of(scenario: str) -> dict[str, Any]:
        if scenario not in results:
            course = Course(home, home / f"straight {scenario}", scenario)
            course.run()
            results[scenario] = course.result()
        return results[scenario]

    return of


def at_step(step: int, act: Callable[[], None]) -> Callable[[Event], None]:
    """Act right after a step, before it is saved."""
    return lambda event: act() if isinstance(event, Stepped) and event.progress.step == step else None


def killed(course: Course, when: Callable[[Event], bool], tmp_path: Path, **settings: Any) -> None:
    """Train in a process of its own that is killed, as by kill -9, at the first event for which `when` holds."""

    def life() -> None:
        course.run(then=lambda event: os.kill(os.getpid(), signal.SIGKILL) if when(event) else None, **settings)

    child = Child(life, tmp_path / "killed.txt")
    assert child.wait() == -signal.SIGKILL, child


def done(step: int) -> Callable[[Event], bool]:
    """The event of a step: it is done and not yet saved."""
    return lambda event: isinstance(event, Stepped) and event.progress.step == step


def saved(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Saved) and event.progress.step == step


# ---- kill -9 ----


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_and_resumed_is_bit_for_bit_the_straight_run(home, straight, tmp_path: Path, scenario: str):
    expected = straight(scenario)
    course = Course(home, tmp_path, scenario)
    killed(course, done(5), tmp_path)
    assert [line["step"] for line in metrics_of(course.output)] == [1, 2, 3, 4, 5]
    assert [path.name for path in course.output.glob("checkpoint-*")] == ["checkpoint-3"]

    heard = course.run()
    assert heard.of(Started)[0].progress.step == 3 and heard.encoded == {}
    assert [event.progress.step for event in heard.of(Stepped)] == [4, 5, 6, 7, 8]
    assert differences(expected, course.result()) == []


def test_the_scenarios_are_what_they_are_for(home, straight):
    """The comparison above could fail: state moves with every step, and the settings have their effect."""
    for scenario in SCENARIOS:
        straight(scenario)
    plan = {name: json.loads((home / f"straight {name}/output/plan.json").read_bytes()) for name in SCENARIOS}
    assert plan["accumulation"]["steps_per_epoch"] == 1.5 and plan["plain"]["epochs"] > 2
    assert len(plan["everything"]["buckets"]) == 3 and plan["everything"]["steps_per_epoch"] == 4.5
    everything = home / "straight everything/output"
    before, after = state_of(everything / "checkpoint-6"), state_of(everything / f"checkpoint-{STEPS}")
    weights = [name for name in after if name.startswith("transformer/")]
    average = [name for name in after if name.startswith("transformer_ema/")]
    moments = [name for name in after if name.endswith(("/exp_avg", "/exp_avg_sq"))]
    assert len(weights) == len(average) > 100 and len(moments) == 2 * len(weights)
    changed = set(differences(before, after))
    assert changed >= {*weights, *moments, "optimizer/param_groups/0/lr", "progress/step"}
    assert changed.isdisjoint(average), "an EMA of every third step stands still after step 6"
    rates = [line["lr"] for line in metrics_of(everything)]
    assert rates[:3] == sorted(rates[:3]) and len(set(rates)) == STEPS - 1 and rates[-1] < rates[3] / 5


def test_two_equal_runs_are_equal_from_pictures_to_pipeline(home, tmp_path: Path):
    """Nothing is shared, and one of them ran in another process."""
    one, two = Course(home, tmp_path / "one"), Course(home, tmp_path / "two")
    for course in (one, two):
        course.cache = course.folder / "cache"
    child = Child(lambda: run(two.loaded()) and 0, tmp_path / "two.txt")
    one.run()
    assert child.wait() == 0, child
    assert differences(one.result(), two.result()) == []
    caches = [cache_of(course.cache) for course in (one, two)]
    assert len(caches[0]) == 5 + 6 + 15 + 12 + 1 and differences(*caches) == []


def test_from_an_older_checkpoint_the_same_end_is_reached(home, straight, tmp_path: Path):
    course = Course(home, tmp_path)
    course.run()
    heard = course.run(resume_from_checkpoint="checkpoint-3")
    assert heard.of(Started)[0].progress.step == 3 and len(heard.of(Stepped)) == STEPS - 3
    assert differences(straight("everything"), course.result()) == []
    newest = folders.find(course.output, "latest")
    assert newest is not None and newest.step == STEPS and folders.damage(newest) == []

    killed(course, done(7), tmp_path, resume_from_checkpoint=str(course.output / "checkpoint-3"))
    heard = course.run()  # latest is the one saved last, step 6 of the new course; not step 8 of the one that was left
    assert heard.of(Started)[0].progress.step == 6
    assert differences(straight("everything"), course.result()) == []


def test_a_longer_run_goes_on_from_a_finished_one(home, straight, tmp_path: Path):
    course = Course(home, tmp_path, "accumulation")
    course.run(max_train_steps=5)
    heard = course.run()
    assert heard.of(Started)[0].progress.step == 5
    assert differences(straight("accumulation"), course.result()) == []


def test_killed_after_the_last_checkpoint_its_pipeline_still_comes(home, straight, tmp_path: Path):
    """Also where the pipeline of a shorter run stands already: that one is not taken for this run's."""
    course = Course(home, tmp_path, "accumulation")
    killed(course, saved(5), tmp_path, max_train_steps=5)
    assert not (course.output / "pipeline").exists()
    assert course.run(max_train_steps=5).of(Stepped) == [] and (course.output / "pipeline").is_dir()
    killed(course, saved(STEPS), tmp_path)
    heard = course.run()
    assert heard.of(Stepped) == [] and len(heard.of(Finished)) == 1
    assert differences(straight("accumulation"), course.result()) == []
    assert course.run().events == [], "now it is finished"


# ---- asked to stop ----


def soon(number: int) -> None:
    """Send this process a signal from a thread a little later: in the middle of whatever comes next."""
    threading.Timer(0.005, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_finishes_the_step_saves_and_goes_on_later(home, straight, tmp_path, number: int, code: int):
    course = Course(home, tmp_path)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    heard = Heard(at_step(4, lambda: soon(number)))
    with pytest.raises(Interrupted) as told:
        run(course.loaded(), sinks=[heard])
    assert told.value.exit_code == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    last = heard.of(Stepped)[-1].progress
    assert 5 <= last.step < STEPS
    assert heard.of(Saved)[-1].progress == last and heard.of(Stopped)[-1].progress == last
    assert heard.of(Finished) == [] and not (course.output / "pipeline").exists()
    saved = folders.find(course.output, "latest")
    assert saved is not None and saved.progress() == last and folders.damage(saved) == []

    again = course.run()
    assert again.of(Started)[0].progress == last
    assert differences(straight("everything"), course.result()) == []


def test_a_second_ctrl_c_leaves_at_once(home, straight, tmp_path: Path):
    course = Course(home, tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("unreachable: the second signal left")

    heard = Heard(at_step(5, twice))
    with pytest.raises(Interrupted) as told:
        run(course.loaded(), sinks=[heard])
    assert told.value.exit_code == 130
    assert heard.of(Stepped)[-1].progress.step == 5 and heard.of(Stopped, Finished) == []
    assert [path.name for path in course.output.glob("*checkpoint-*")] == ["checkpoint-3"], "nothing was begun"
    course.run()
    assert differences(straight("everything"), course.result()) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_while_caching_it_leaves_and_keeps_what_was_made(home, tmp_path: Path, number: int, code: int):
    course = Course(home, tmp_path, "plain")
    course.cache = tmp_path / "cache"

    def stop(event: Event) -> None:
        if isinstance(event, CacheProgress) and event.cache != "text" and event.done >= 2:
            os.kill(os.getpid(), number)

    heard = Heard(stop)
    with pytest.raises(Interrupted) as told:
        run(course.loaded(vae_batch_size=1), sinks=[heard])
    assert told.value.exit_code == code and heard.of(Started) == []
    assert len(cache_of(course.cache / "vae")) == 2
    assert course.run(max_train_steps=1).encoded == {"latents of d0": 3}


def test_the_command_line_ends_with_the_signals_code_and_goes_on(home, tmp_path: Path):
    course = Course(home, tmp_path, "plain")
    course.loaded(max_train_steps=100_000, checkpoint_step_interval=0)
    command = ["train", "--config", str(tmp_path / "config.json")]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = len(metrics_of(course.output))
        child = Child(lambda: exit_code(command), tmp_path / "output.txt")
        child.until(lambda before=before: len(metrics_of(course.output)) > before)
        child.send(number)
        assert child.wait() == code, child
        done = len(metrics_of(course.output))
        saved = folders.find(course.output, "latest")
        assert done > before and saved is not None and saved.step == done
    child = Child(lambda: exit_code([*command, "--max_train_steps", str(done + 1)]), tmp_path / "output.txt")
    assert child.wait() == 0, child
    assert str(child).count("once more leaves at once") == 2 and "Traceback" not in str(child)
    assert len(metrics_of(course.output)) == done + 1


# ---- a finished run ----


def test_a_finished_run_says_so_and_restart_begins_anew(home, straight, tmp_path: Path, caplog):
    course = Course(home, tmp_path, "accumulation")
    course.run()
    kept = {path: path.stat().st_mtime_ns for path in course.output.glob("checkpoint-*/**/*")}
    lines = read_metrics(course.output / "metrics.jsonl")

    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO):
            assert run(course.loaded()) == Progress(STEPS, STEPS / 1.5, STEPS * 4)
    finally:
        log.removeHandler(caplog.handler)
    assert "This run is finished" in caplog.text and "max_train_steps" in caplog.text and "--restart" in caplog.text
    assert kept == {path: path.stat().st_mtime_ns for path in course.output.glob("checkpoint-*/**/*")}
    assert read_metrics(course.output / "metrics.jsonl") == lines
    assert exit_code(["train", "--config", str(tmp_path / "config.json")]) == 0

    heard = course.run(restart=True)
    assert heard.of(Started)[0].progress.step == 0 and heard.encoded == {}
    aside = course.output / "before_restart_1"
    assert {path.name for path in aside.iterdir()} >= {"metrics.jsonl", "pipeline", "config.json", "checkpoint-8"}
    assert read_metrics(aside / "metrics.jsonl") == lines
    assert differences(straight("accumulation"), course.result()) == []
    assert differences(state_of(aside / f"checkpoint-{STEPS}"), state_of(course.output / f"checkpoint-{STEPS}")) == []
