"""Which checkpoints stay, how many there are at a time, and whether training waits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import load
from sana_tune.progress import Every
from sana_tune.saving import Keeping, Stand, best, decide_saving, keeping_of, most_at_once, reasons, saved_at
from tests.config.helpers import write_files

GB = 10**9


def kept(keeping: Keeping, *stands: Stand) -> dict[int, tuple[str, ...]]:
    return {stand.step: why for stand, why in zip(stands, reasons(stands, keeping), strict=True) if why}


def test_each_rule_keeps_its_own_and_says_so():
    stands = [
        Stand(100, loss=0.9), Stand(200, loss=0.2), Stand(250, rolling=True), Stand(300), Stand(350, rolling=True),
        Stand(400, loss=0.3), Stand(500, loss=0.5),
    ]  # fmt: skip
    assert kept(Keeping(), *stands) == {
        100: ("all are kept",), 200: ("all are kept",), 300: ("all are kept",), 350: ("newest 1 rolling",),
        400: ("all are kept",), 500: ("all are kept",),
    }  # fmt: skip
    assert kept(Keeping(1, every=300, best=2, rolling_limit=2), *stands) == {
        200: ("best 2",), 250: ("newest 2 rolling",), 300: ("multiple of 300",), 350: ("newest 2 rolling",),
        400: ("best 2",), 500: ("newest 1",),
    }  # fmt: skip
    assert kept(Keeping(2, every=500), *stands)[500] == ("newest 2", "multiple of 500")
    assert kept(Keeping(3)) == {}


def test_the_best_are_the_lowest_numbers_that_are_numbers():
    stands = [Stand(1, loss=float("nan")), Stand(2, loss=0.5), Stand(3), Stand(4, loss=0.5), Stand(5, loss=0.1)]
    assert best(stands, 9) == [4, 3, 1], "of equal ones the later is better"
    assert best(stands, 1) == [4] and best(stands, 0) == []


@pytest.mark.parametrize(
    ("keeping", "every", "steps", "epochs", "most"),
    [
        (Keeping(5), Every(0), 100, 3, 1),
        (Keeping(5), Every(10), 35, 3, 4),
        (Keeping(5), Every(10), 1000, 3, 5),
        (Keeping(0), Every(10), 1000, 3, 100),
        (Keeping(1), Every(10), 1000, 3, 2),  # the one before stays until its successor stands
        (Keeping(1), Every(0), 1000, 3, 1),
        (Keeping(2, every=100), Every(10), 1000, 3, 12),
        (Keeping(2, every=100, best=3), Every(10), 1000, 3, 15),
        (Keeping(2, best=3), Every(10), 30, 3, 3),
        (Keeping(2, rolling_every=5, rolling_limit=2), Every(100), 1000, 3, 4),
        (Keeping(9), Every(0, 1), 1000, 4.5, 4),
        (Keeping(5), Every(1), 0, 0, 1),
    ],
)
def test_the_most_that_are_there_at_a_time(keeping: Keeping, every: Every, steps: int, epochs: float, most: int):
    assert most_at_once(keeping, every, steps, epochs) == most


def asked(tmp_path: Path, **settings: Any) -> Any:
    return load(write_files(tmp_path, settings), {}, {}).config


def test_what_was_asked_for(tmp_path: Path):
    config = asked(
        tmp_path, checkpoints_total_limit=3, checkpoints_keep_every=1000, checkpoints_keep_best=2,
        checkpointing_rolling_steps=50, checkpoints_rolling_total_limit=4, checkpoint_epoch_interval=2,
    )  # fmt: skip
    assert keeping_of(config) == Keeping(3, 1000, 2, 50, 4) and saved_at(config) == Every(500, 2)
    assert keeping_of(config).words == (
        "the newest 3, every multiple of 1000 steps, the best 2 by held-out loss, the newest 4 of the rolling ones "
        "(every 50 steps)"
    )
    assert keeping_of(asked(tmp_path, checkpoints_total_limit=0)).words == "all"


def test_training_waits_where_main_memory_has_no_room_for_a_copy(tmp_path: Path):
    auto = asked(tmp_path)
    fits = decide_saving(auto, 20 * GB, 0, 64 * GB)
    assert fits.background and fits.why == "a copy takes 20.0 GB of main memory, and 64.0 GB are free"
    short = decide_saving(auto, 20 * GB, 5 * GB, 26 * GB)
    assert not short.background and "beside 5.0 GB of training, and 26.0 GB are free" in short.why
    assert not decide_saving(auto, 1, 0, None).background
    for choice, background in (("background", True), ("wait", False)):
        made = decide_saving(asked(tmp_path, checkpoint_writing=choice), 20 * GB, 0, 1)
        assert (made.background, made.why) == (background, "as asked")
