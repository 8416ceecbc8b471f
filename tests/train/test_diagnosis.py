"""Bad numbers of every kind: caught before the step, named rightly, and the weights are those of a run without them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.errors import UserError
from sana_tune.progress import Every, Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.diagnosis import FILE
from sana_tune.train.loop import fit
from sana_tune.train.signals import Stop
from sana_tune.train.step import Parts, passed_over, train_step
from sana_tune.train.validate import NoValidator
from sana_tune.watch.events import Event, Finished, Noticed, Stepped
from sana_tune.watch.sinks import Watcher
from tests.train.poison import INF, NAN, PoisonedBatches, Steps, poisoned_gradient, poisoned_output
from tests.train.toys import Course, ToyBatches, differences, make_parts, state_of


class Kept:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def fitted(folder: Path, parts: Parts, batches: ToyBatches, steps: int = 4, limit: int = 2) -> list[Event]:
    kept = Kept()
    course = Course(steps, save_every=Every(2))
    with Watcher([kept]) as watcher:
        fit(
            course, parts, batches, NoValidator(), Checkpoints(folder), watcher, Stop(), max_bad_steps=limit,
        )  # fmt: skip
    return kept.events


def without(steps: int, bad: tuple[int, ...], accumulation: int = 1, **made: Any) -> Parts:
    """What a run leaves that passes the bad steps over."""
    parts = make_parts(**made)
    for step, batches in enumerate(ToyBatches(accumulation).steps(0, steps)):
        (passed_over if step in bad else train_step)(parts, batches, Progress(step))
    return parts


# place → (what poisons it, the stage, what is named). Modules and weights of the second block; the second sample.
MODULE, WEIGHT = "transformer_blocks.1.attn2.to_q", "transformer_blocks.1.ff.conv_point.weight"
PLACES: dict[str, tuple[str, str]] = {
    "latents": ("inputs", "the latent of toy/{index}-1, as its cache holds it"),
    "text": ("inputs", "the embedding of the caption of toy/{index}-1, as its cache holds it"),
    "loss_mask": ("inputs", "the mask of toy/{index}-1, as its cache holds it"),
    "output": ("forward", f"{MODULE} (Linear)"),
    "gradient": ("gradient", WEIGHT),
}


def poisoned(
    place: str, parts: Parts, steps: tuple[int, ...], value: float, accumulation: int = 1
) -> tuple[ToyBatches, AbstractContextManager[None]]:
    watch = Steps(steps)
    if place == "output":
        return watch.watch(ToyBatches(accumulation)), poisoned_output(parts, MODULE, value, watch)
    if place == "gradient":
        return watch.watch(ToyBatches(accumulation)), poisoned_gradient(parts, WEIGHT, value, watch)
    return PoisonedBatches(steps, place, value, accumulation), nullcontext()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("value", "accumulation"), [(NAN, 1), (INF, 2)])
def test_a_bad_step_moves_nothing_and_the_run_goes_on(tmp_path: Path, place: str, value: float, accumulation: int):
    parts = make_parts()
    batches, poison = poisoned(place, parts, (1,), value, accumulation)
    with poison:
        events = fitted(tmp_path, parts, batches)
    assert differences(state_of(parts), state_of(without(4, (1,), accumulation))) == []
    assert [event.progress.step for event in events if isinstance(event, Stepped) and event.skipped] == [2]
    (told,) = [event for event in events if isinstance(event, Noticed)]
    assert told.message.startswith("step 2 was skipped: its ") and f"toy/{accumulation}-1" in told.message
    assert isinstance(events[-1], Finished) and events[-1].skipped == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("value", "release"), [(NAN, True), (INF, False)])
def test_in_a_row_they_end_the_run_and_the_first_bad_thing_is_named(
    tmp_path: Path, place: str, value: float, release: bool
):
    parts = make_parts(release=release)
    batches, poison = poisoned(place, parts, (2, 3, 4), value)
    with pytest.raises(UserError) as caught, poison:
        fitted(tmp_path, parts, batches, steps=6, limit=3)
    stage, named = PLACES[place]
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert (found["finding"]["stage"], found["finding"]["place"]) == (stage, named.format(index=4))
    assert found["step"] == 5 and [sample["id"] for sample in found["samples"]][:2] == ["toy/4-0", "toy/4-1"]
    assert all(0 < sample["sigma"] < 1 for sample in found["samples"])
    (problem,) = caught.value.problems
    assert problem.where == "step 5" and "3 steps in a row" in problem.what and named.format(index=4) in problem.what
    assert "The checkpoint checkpoint-4 is sound" in problem.what.replace("the checkpoint", "The checkpoint")
    assert problem.fix and "toy/4-1: noise level" in problem.what
    newest = folders.find(tmp_path, "latest")
    assert newest is not None and newest.step == 4 and folders.damage(newest) == []
    differing = differences(state_of(parts), state_of(without(2, (), release=release)))
    assert differing == [], "nothing moved after the last good step"


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path):
    parts = make_parts()
    with torch.no_grad():
        parts.bare.get_parameter(WEIGHT).view(-1)[0] = NAN
    with pytest.raises(UserError, match="he weights themselves are not finite") as caught:
        fitted(tmp_path, parts, ToyBatches())
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert found["finding"] == {"stage": "weights", "place": WEIGHT, "exact": ""}
    assert "there is no checkpoint yet" in str(caught.value)


def test_a_gradient_between_modules_is_named(tmp_path: Path):
    """The root's slope at 0 is infinite: what comes out is finite, what flows back is not."""
    parts = make_parts()
    target = parts.bare.get_submodule(MODULE)
    inner = target.forward
    target.forward = lambda x: torch.sqrt(inner(x).square() * 0) + inner(x)
    with pytest.raises(UserError, match="he forward pass is finite"):
        fitted(tmp_path, parts, ToyBatches(), limit=1)
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["finding"]
    assert found["stage"] == "backward" and found["place"].startswith("transformer_blocks.")


def test_what_overflows_in_bf16_alone_is_known_by_fp32(tmp_path: Path):
    """A weight so large that the product overflows where fp32 would not: fp16's range, scaled up to bf16's."""
    parts = make_parts(mixed_precision="bf16", max_grad_norm=0.0)
    target = parts.bare.get_submodule(MODULE)
    inner = target.forward
    target.forward = lambda x: (
        inner(x) if x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") else (inner(x) * float("inf"))
    )
    with pytest.raises(UserError, match="in fp32 the same pass is finite, so precision is the cause") as caught:
        fitted(tmp_path, parts, ToyBatches(), limit=1)
    assert "--mixed_precision no" in caught.value.problems[0].fix
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert found["finding"]["exact"] == "finite" and found["finding"]["place"] == f"{MODULE} (Linear)"


def test_what_is_bad_in_fp32_too_is_known(tmp_path: Path):
    parts = make_parts(dtype=torch.bfloat16)
    steps = Steps((0, 1))
    with pytest.raises(UserError, match="precision is not the cause"), poisoned_output(parts, MODULE, NAN, steps):
        fitted(tmp_path, parts, steps.watch(ToyBatches()))


def test_what_cannot_be_repeated_is_the_machines(tmp_path: Path):
    parts = make_parts()
    left = [2]  # forward passes of the training steps; the replay's is the third

    target = parts.bare.get_submodule(MODULE)
    inner = target.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        return inner(x) * (NAN if left[0] >= 0 else 1)

    target.forward = forward
    with pytest.raises(UserError, match="one once more, the same step is finite") as caught:
        fitted(tmp_path, parts, ToyBatches())
    assert "the machine" in caught.value.problems[0].fix
