"""Progress: where a run stands and what is due there."""

from __future__ import annotations

import json

import pytest

from sana_tune.progress import Every, Progress, due


def test_advance_counts_one_step():
    assert Progress(4, 1.5, 30).advance(8, 1.75) == Progress(5, 1.75, 38)


def test_json_gives_the_same_position_back():
    progress = Progress(3, 1 / 3, 17)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


def test_other_keys_are_left_alone_and_missing_ones_are_told():
    assert Progress.from_json({"step": 1, "epoch": 0.5, "images": 2, "run": {}}) == Progress(1, 0.5, 2)
    with pytest.raises(KeyError):
        Progress.from_json({"step": 1})


@pytest.mark.parametrize(
    ("every", "step", "expected"),
    [
        (0, 0, False),
        (0, 10, False),
        (5, 0, False),
        (5, 4, False),
        (5, 5, True),
        (5, 6, False),
        (5, 10, True),
        (1, 1, True),
    ],
)
def test_due(every: int, step: int, expected: bool):
    assert due(Every(every), Progress(step)) is expected


@pytest.mark.parametrize(
    ("every", "steps_per_epoch", "expected"),
    [
        (Every(epochs=1), 3, [3, 6, 9]),
        (Every(epochs=1), 2.5, [3, 5, 8, 10]),  # a step that goes on into the next epoch has ended the one before
        (Every(epochs=0.5), 4, [2, 4, 6, 8, 10]),
        (Every(epochs=2), 10 / 3, [7]),
        (Every(epochs=1), 0.5, list(range(1, 11))),
        (Every(4, epochs=1), 3, [3, 4, 6, 8, 9]),
        (Every(2, after_step=5), 3, [6, 8, 10]),
        (Every(2, epochs=1, after_epoch=2), 3, [6, 8, 9, 10]),
        (Every(epochs=0), 3, []),
    ],
)
def test_due_by_epochs_and_not_before_a_step(every: Every, steps_per_epoch: float, expected: list[int]):
    def epoch_after(step: int) -> float:
        return step / steps_per_epoch

    found = [step for step in range(11) if due(every, Progress(step, epoch_after(step)), epoch_after)]
    assert found == expected
