from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.log import log
from sana_tune.progress import Every, Progress
from sana_tune.saving import Keeping
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.evaluate import (
    DRIFT_ITEMS,
    FILE,
    VELOCITIES,
    Best,
    Evaluator,
    NoEvaluator,
    best_advice,
    drift_advice,
    drift_items,
    gap_advice,
    judged,
)
from sana_tune.train.loop import fit
from sana_tune.train.paired import Drift, Paired
from sana_tune.train.probe import Look, Probe, Subject
from sana_tune.train.signals import Stop
from sana_tune.train.step import Parts
from sana_tune.train.validate import NoValidator
from sana_tune.watch.events import Event, Measured
from sana_tune.watch.sinks import Watcher
from tests.journeys.kit import Child
from tests.train.toys import CHANNELS, TEXT_WIDTH, Course, ToyBatches, differences, make_parts, state_of


def look(number: int) -> Look:
    generator = torch.Generator().manual_seed(number)
    return Look(torch.randn(CHANNELS, 4, 4, generator=generator), torch.randn(4, TEXT_WIDTH, generator=generator))


def probe(first: int, count: int, dataset: str = "d", *, made_of: str = "it") -> Probe:
    subjects = [Subject(f"{dataset}/{n}", dataset, 4, 4, made_of) for n in range(first, first + count)]
    return Probe(subjects, lambda number: look(first + number), levels=3, positions=64, seed=7)


def evaluator(folder: Path, **settings: Any) -> Evaluator:
    """Three held-out pictures and three trained ones."""
    held = settings.pop("held", None) or probe(0, 3)
    return Evaluator(folder, held, settings.pop("trained", probe(10, 3)), **settings)


def nudged(parts: Parts, amount: float = 0.02, seed: int = 1) -> Parts:
    """The model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.bare.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return parts


def values(measured: Measured | None) -> dict[str, float]:
    assert measured is not None
    return dict(measured.values)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of the log."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


# ---- the numbers ----


def test_the_base_model_is_one_and_has_no_drift(tmp_path: Path):
    found = values(evaluator(tmp_path).start(make_parts(), Progress()))
    assert found["held_out/raw"] == found["trained/raw"] == 1.0 and found["held_out/raw/se"] == 0.0
    assert found["gap/raw"] == found["drift"] == 0.0 and found["held_out/raw/loss"] > 0
    assert not any("ema" in name for name in found), "at the start the average is the base model"
    levels = {name.partition("sigma_")[2] for name in found if "sigma_" in name}
    assert levels == {"0.53", "0.75", "0.89"}, "the middles of thirds of the shifted logit-normal"


def test_numbers_are_told_against_the_base(tmp_path: Path):
    parts, mine = make_parts(), evaluator(tmp_path)
    mine.start(parts, Progress())
    kept = json.loads((tmp_path / FILE).read_text())
    base = torch.tensor(kept["base"]["held_out"], dtype=torch.float64)
    nudged(parts)
    parts.ema.update(1)
    found = values(mine.run(parts, Progress(1)))
    now = probe(0, 3).measure(parts).losses
    assert found["held_out/raw"] == pytest.approx(float((now.mean(0) / base.mean(0)).mean()))
    levels = [value for name, value in found.items() if name.startswith("held_out/raw/sigma_")]
    assert levels == pytest.approx((now.mean(0) / base.mean(0)).tolist())
    with parts.ema.swapped():
        averaged = probe(0, 3).measure(parts).losses
    assert (
        found["held_out/ema"] == pytest.approx(float((averaged.mean(0) / base.mean(0)).mean())) != found["held_out/raw"]
    )
    assert found["gap/raw"] == pytest.approx(found["held_out/raw"] - found["trained/raw"])
    assert 0 < found["drift"] and judged(mine.run(parts, Progress(1))) == found["held_out/ema"]


def test_the_same_model_gives_the_same_numbers(tmp_path: Path):
    parts, mine = make_parts(), evaluator(tmp_path)
    mine.start(parts, Progress())
    nudged(parts)
    torch.manual_seed(1)
    first = values(mine.run(parts, Progress(1)))
    torch.manual_seed(2)
    assert values(mine.run(parts, Progress(2))) == first


def test_one_picture_is_enough(tmp_path: Path):
    mine = evaluator(tmp_path, held=probe(0, 1), trained=probe(10, 1))
    parts = make_parts(ema_decay=None)
    mine.start(parts, Progress())
    found = values(mine.run(nudged(parts), Progress(1)))
    assert found["held_out/raw"] != 1 and not any(name.endswith("/se") for name in found)


@pytest.mark.parametrize("pooled", [False, True])
def test_datasets_are_told_apart_unless_pooled(tmp_path: Path, pooled: bool):
    subjects = [*probe(0, 2, "cats").subjects, *probe(2, 1, "Großes/raw").subjects]
    held = Probe(subjects, look, levels=3, positions=64, seed=7)
    mine = evaluator(tmp_path, held=held, pooled=pooled, names={"cats": "cats", "Großes/raw": "raw"})
    found = values(mine.start(make_parts(), Progress()))
    assert ("held_out/cats/raw" in found, "held_out/raw/raw" in found) == (not pooled, not pooled)
    assert "held_out/cats/raw/se" in found or pooled
    assert "held_out/raw" in found


def test_without_alarms_the_loss_alone_is_told(tmp_path: Path):
    parts, mine = make_parts(), evaluator(tmp_path, alarms=False)
    mine.start(parts, Progress())
    measured = mine.run(nudged(parts, 0.3), Progress(1))
    assert measured is not None and measured.advice == ()
    assert {name.partition("/")[0] for name in measured.values} == {"held_out"}
    assert not (tmp_path / VELOCITIES).exists()


def test_spoiled_weights_are_told_and_nothing_infinite_leaves(tmp_path: Path):
    parts, mine = make_parts(), evaluator(tmp_path)
    mine.start(parts, Progress())
    with torch.no_grad():
        parts.bare.proj_out.bias.fill_(float("nan"))
    measured = mine.run(parts, Progress(3))
    assert measured is not None and measured.advice[0].startswith("not finite: held_out/raw")
    assert all(value == value for value in measured.values.values()) and "held_out/raw" not in measured.values
    assert json.loads((tmp_path / FILE).read_text())["best"]["step"] == 0


# ---- start, resume, finish ----


def test_what_a_run_measured_is_read_when_it_goes_on(tmp_path: Path, said: list[str]):
    parts = make_parts()
    first = evaluator(tmp_path)
    first.start(parts, Progress())
    nudged(parts)
    expected = values(first.run(parts, Progress(4)))
    again = evaluator(tmp_path)
    assert again.start(parts, Progress(4)) is None
    assert values(again.run(parts, Progress(4))) == expected and said == []


@pytest.mark.parametrize("lost", ["file", "torn", "pictures", "captions"])
def test_a_lost_base_is_said_and_the_first_model_takes_its_place(tmp_path: Path, said: list[str], lost: str):
    parts = make_parts()
    evaluator(tmp_path).start(parts, Progress())
    nudged(parts)
    if lost == "file":
        (tmp_path / FILE).unlink()
    elif lost == "torn":
        (tmp_path / FILE).write_text('{"step": 0, "ba')
    held = {"pictures": probe(0, 4), "captions": probe(0, 3, made_of="other words")}.get(lost)
    again = evaluator(tmp_path, held=held)
    found = values(again.start(parts, Progress(4)))
    assert found["held_out/raw"] == 1.0
    (line,) = said
    assert "from here on it is told against the model as it is at step 4" in line
    third = evaluator(tmp_path, held=held)
    assert third.start(parts, Progress(8)) is None
    assert said[1:] == ["the held-out loss is told against the model of step 4"]


def test_a_fresh_run_measures_anew(tmp_path: Path):
    evaluator(tmp_path).start(make_parts(), Progress())
    other = nudged(make_parts(), 0.3)
    assert values(evaluator(tmp_path).start(other, Progress()))["held_out/raw"] == 1.0


def test_alarms_that_were_off_cannot_be_told_later(tmp_path: Path, said: list[str]):
    parts = make_parts()
    evaluator(tmp_path, alarms=False).start(parts, Progress())
    mine = evaluator(tmp_path)
    mine.start(parts, Progress(4))
    assert "does not hold all that the alarms compare with" in said[0]
    found = values(mine.run(parts, Progress(4)))
    assert "gap/raw" not in found and "drift" not in found and found["held_out/raw"] == 1.0


def test_alarms_that_are_off_for_a_while_lose_nothing(tmp_path: Path, said: list[str]):
    parts = make_parts()
    evaluator(tmp_path).start(parts, Progress())
    off = evaluator(tmp_path, alarms=False)
    off.start(parts, Progress(2))
    off._best = None  # so that the file is written again
    off.run(nudged(parts), Progress(3))
    mine = evaluator(tmp_path)
    mine.start(parts, Progress(4))
    assert {"gap/raw", "drift"} < set(values(mine.run(parts, Progress(4)))) and said == []


def test_predictions_of_another_run_are_not_taken(tmp_path: Path, said: list[str]):
    parts = make_parts()
    evaluator(tmp_path).start(parts, Progress())
    (tmp_path / VELOCITIES).write_bytes(b"torn")
    mine = evaluator(tmp_path)
    mine.start(parts, Progress(4))
    found = values(mine.run(parts, Progress(4)))
    assert "drift" not in found and "gap/raw" in found and "the gap or the drift is not told" in said[0]


def test_the_end_is_measured_once(tmp_path: Path):
    parts, mine = make_parts(), evaluator(tmp_path)
    mine.start(parts, Progress())
    assert mine.finish(parts, Progress()) is None
    assert mine.finish(parts, Progress(3)) is not None and mine.finish(parts, Progress(3)) is None


def test_a_measurement_that_is_stopped_tells_nothing(tmp_path: Path):
    parts = make_parts()
    stopped = evaluator(tmp_path, stopped=lambda: True)
    assert stopped.start(parts, Progress()) is None and not (tmp_path / FILE).exists()
    assert judged(stopped.run(parts, Progress(1))) is None


# ---- advice ----


def told(mean: float, se: float | None = 0.001, changes: tuple[float, ...] = ()) -> Paired:
    return Paired(mean, (mean + 0.01, mean - 0.01), se, changes, 1.0)


NAMES = ("0.30", "0.70")


def test_a_gap_is_told_when_it_is_wide_and_sure():
    (line,) = gap_advice(told(0.98), Paired(0.88, (0.80, 0.96), 0.001, (), 1.0), NAMES)
    assert (
        line.startswith("overfitting: trained pictures gained 10 % of the base model's loss more") and "σ 0.30" in line
    )
    assert gap_advice(told(0.98), told(0.94), NAMES) == [], "narrow"
    assert gap_advice(told(0.98, 0.1), told(0.88, 0.1), NAMES) == [], "not sure"
    assert gap_advice(told(0.98, None), told(0.88, None), NAMES) != [], "of one picture nothing better is known"
    assert gap_advice(told(0.88), told(0.98), NAMES) == []


def test_drift_is_told_when_it_leads_nowhere():
    (line,) = drift_advice(Drift(0.4, 0.1))
    assert line.startswith("drift: predictions are 40 % of their length away from the base model's")
    assert drift_advice(Drift(0.2, 0.0)) == [] and drift_advice(Drift(0.8, 0.7)) == []
    assert drift_advice(Drift(float("nan"), 0.0)) == []


def test_a_loss_that_rises_again_is_told():
    best = Best(20, 0.90, (-0.1, -0.11, -0.09))
    (line,) = best_advice(told(0.95, changes=(-0.05, -0.055, -0.045)), best, 40)
    assert line.startswith("held-out loss: the model of step 20 was better (0.900, now 0.950)")
    (line,) = best_advice(told(1.1, changes=(0.1, 0.1, 0.1)), Best(0, 1.0, (0.0, 0.0, 0.0)), 40)
    assert "the base model was better" in line
    assert best_advice(told(0.905, changes=(-0.095, -0.105, -0.085)), best, 40) == [], "hardly"
    assert best_advice(told(0.95, changes=(0.2, -0.3, -0.05)), best, 40) == [], "not sure: the pictures disagree"
    assert best_advice(told(0.95, changes=(0.0, 0.0)), best, 40) == [] and best_advice(told(2.0), None, 4) == []


def test_the_best_is_remembered_over_a_resume(tmp_path: Path):
    parts, mine = make_parts(ema_decay=None), evaluator(tmp_path)
    mine.start(parts, Progress())
    nudged(parts, 0.5)
    again = evaluator(tmp_path)
    again.start(parts, Progress(4))
    measured = again.run(parts, Progress(5))
    assert measured is not None and measured.values["held_out/raw"] > 1.1
    assert any("the base model was better" in line for line in measured.advice)
    assert any(line.startswith("drift: ") for line in measured.advice)


def test_drift_is_of_a_few_items_spread_out():
    assert drift_items(1, 3) == ((0, 0), (0, 1), (0, 2))
    many = drift_items(20, 8)
    assert (
        len(many) == DRIFT_ITEMS
        and len({number for number, _ in many}) == 16
        and {level for _, level in many} == set(range(8))
    )


def test_nothing_held_out_nothing_told():
    none, parts = NoEvaluator(), make_parts()
    assert [none.start(parts, Progress()), none.run(parts, Progress(1)), none.finish(parts, Progress(2))] == [None] * 3


# ---- in the loop ----


def test_the_loop_measures_at_start_on_the_way_and_at_the_end_and_trains_as_without(tmp_path: Path):
    class Story:
        def __init__(self) -> None:
            self.measured: list[Measured] = []

        def emit(self, event: Event) -> None:
            if isinstance(event, Measured):
                self.measured.append(event)

        def close(self) -> None:
            pass

    states = []
    for name, mine in (("without", NoEvaluator()), ("with", evaluator(tmp_path))):
        torch.manual_seed(3)
        parts, story = make_parts(), Story()
        course = Course(5, steps_per_epoch=2.0, evaluate_every=Every(2, epochs=1.5))
        checkpoints = Checkpoints(tmp_path / name, Keeping(1), {})
        (tmp_path / name).mkdir()
        fit(course, parts, ToyBatches(), NoValidator(), checkpoints, Watcher([story]), Stop(), evaluator=mine)
        states.append(state_of(parts))
    assert [each.progress.step for each in story.measured] == [0, 2, 3, 4, 5], "3 ends one and a half epochs"
    assert differences(*states) == []
    assert story.measured[-1].values["held_out/ema"] != 1.0


# ---- two processes ----


def measured_on(folder: Path, rank: int = 0, ranks: int = 1, port: int = 0) -> None:
    """Measure a model as one of so many processes; the numbers go to folder/rank."""
    from accelerate.state import PartialState

    if ranks > 1:
        PartialState._reset_state()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    parts = make_parts()
    assert parts.accelerator.num_processes == ranks
    torch.set_num_threads(1)
    mine = evaluator(folder)
    mine.start(parts, Progress())
    nudged(parts)
    parts.ema.update(1)
    found = values(mine.run(parts, Progress(1)))
    parts.accelerator.wait_for_everyone()
    again = evaluator(folder)
    assert again.start(parts, Progress(1)) is None and values(again.run(parts, Progress(1))) == found
    (folder / str(rank)).write_text(json.dumps(found))


def test_two_processes_tell_and_keep_what_one_does(tmp_path: Path):
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = probing.getsockname()[1]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one = Child(lambda: measured_on(folders[0]), tmp_path / "one.log")
    assert one.wait() == 0, one
    two = [Child(lambda rank=rank: measured_on(folders[1], rank, 2, port), tmp_path / f"{rank}.log") for rank in (0, 1)]
    assert [child.wait() for child in two] == [0, 0], two
    told = (folders[0] / "0").read_text()
    assert (folders[1] / "0").read_text() == (folders[1] / "1").read_text() == told
    for name in (FILE, VELOCITIES):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
