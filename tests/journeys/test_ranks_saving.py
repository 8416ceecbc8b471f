"""Several processes and a disk that does not take their checkpoint: all wait, all go on, all leave, or all end."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_tune import run as runs
from sana_tune.config.load import load
from sana_tune.errors import Interrupted, OthersFailed, UserError
from sana_tune.train import folders
from sana_tune.watch.events import Event, Noticed, Saved
from tests.journeys.kit import Child, Heard, all_well, metrics_of, ranks
from tests.journeys.mounts import small_disk, with_own_mounts
from tests.journeys.test_ranks import MOST, new_run, worst
from tests.journeys.test_saves import fill, fill_at, sound

DISK_BYTES = 120_000_000  # room for three checkpoints of 28 MB and a pipeline
SAVING = {"max_train_steps": 5, "checkpoint_step_interval": 1, "checkpoints_total_limit": 3}
Life = Callable[[int, Any], int]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint at the end of a run of two processes that nothing disturbed."""
    path = new_run(tmp_path_factory.mktemp("straight") / "run", **SAVING)
    all_well(two(path))
    return path.parent / "output/checkpoint-5"


def two(path: Path, then: Callable[[int, Event], None] = lambda rank, event: None) -> list[Child]:
    """The run in two processes. then: given the rank and what the main process tells.

    Exit code 1: it failed and says why; 2: it says that another one did; 128 + n: a signal asked it to stop.
    """

    def life(rank: int) -> int:
        try:
            runs.run(load(path, {}), sinks=[Heard(lambda event: then(rank, event))])
        except Interrupted as error:
            return error.exit_code
        except UserError as error:
            print(f"error: {error}")
            return 2 if isinstance(error, OthersFailed) else 1
        return 0

    return ranks(2, life, path.parent)


def on_small_disk(folder: Path, life: Callable[[Path], None], **settings: Any) -> str:
    """Do something with the config of a run whose folder is on a small disk, folder/disk. Answers what was said."""
    path = new_run(folder / "run", output_dir=str(folder / "disk/output"), cache_dir=str(folder / "cache"), **SAVING)
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    def child() -> int:
        small_disk(folder / "disk", DISK_BYTES)
        life(path)
        return 0

    ended = with_own_mounts(child, folder / "console.txt")
    assert ended.wait() == 0, ended
    said = "".join(log.read_text() for log in sorted(path.parent.glob("rank-*.txt")))
    assert "Traceback" not in said and "Logging error" not in said
    return said


@pytest.mark.parametrize("moment", ["before", "during"])
def test_all_wait_for_room_and_go_on(tmp_path: Path, straight: Path, moment: str):
    """Filled before a save, or while one is written."""
    disk = tmp_path / "disk"

    def then(rank: int, event: Event) -> None:
        if moment == "before" and isinstance(event, Saved) and event.progress.step == 2:
            fill(disk, 1_000_000)
        if isinstance(event, Noticed) and "until there is room" in event.message:
            assert 2 in sound(disk / "output")
            (disk / "filler").unlink()

    def life(path: Path) -> None:
        if moment == "during":  # both have the hook; the main process alone writes
            fill_at(disk, f"{disk}/output/.checkpoint-3.", "/optimizer.pt")
        all_well(two(path, then))
        assert sound(disk / "output") == [3, 4, 5]
        assert worst(straight, disk / "output/checkpoint-5") <= MOST
        assert [line["step"] for line in metrics_of(disk / "output")] == [1, 2, 3, 4, 5]

    said = on_small_disk(tmp_path, life)
    assert said.count("checkpoint-3 needs 28") == 1 and said.count("There is room again") == 1


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_either_ends_the_wait_of_both(tmp_path: Path, straight: Path, asked: int):
    disk = tmp_path / "disk"

    def life(path: Path) -> None:
        def then(rank: int, event: Event) -> None:
            if isinstance(event, Saved) and event.progress.step == 2:
                fill(disk, 1_000_000)

        children = two(path, then)
        children[0].until(lambda: "until there is room" in repr(children[0]))
        children[asked].send(signal.SIGTERM)
        assert [child.wait(30) for child in children] == [128 + signal.SIGTERM] * 2, children
        assert sound(disk / "output") == [1, 2]
        (disk / "filler").unlink()
        all_well(two(path))
        assert worst(straight, disk / "output/checkpoint-5") <= MOST

    assert "the newest is of step 2, and the run goes on there" in on_small_disk(tmp_path, life)


def test_where_a_full_disk_is_to_end_the_run_all_end_and_one_says_why(tmp_path: Path):
    disk = tmp_path / "disk"

    def life(path: Path) -> None:
        def then(rank: int, event: Event) -> None:
            if isinstance(event, Saved) and event.progress.step == 2:
                fill(disk, 1_000_000)

        assert [child.wait(60) for child in two(path, then)] == [1, 2]
        assert sound(disk / "output") == [1, 2]

    said = on_small_disk(tmp_path, life, disk_low_action="stop")
    assert said.count("checkpoint-3 needs 28") == 1 and said.count("the disk is too full") == 1


def test_a_write_that_fails_ends_all_and_one_says_why(tmp_path: Path):
    """Not for want of room: the file must not get so large. The checkpoints before it stay."""
    path = new_run(tmp_path / "run", **SAVING)

    def then(rank: int, event: Event) -> None:
        if isinstance(event, Saved) and event.progress.step == 2:  # told to the main process alone
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    children = two(path, then)
    assert [child.wait(60) for child in children] == [1, 2], children
    output = path.parent / "output"
    assert sound(output) == [1, 2] and folders.damage(folders.list_complete(output)[-1]) == []
    assert "the checkpoint could not be written: " in repr(children[0]) and "Traceback" not in repr(children)
    assert "the main process could not save" in repr(children[1])
    shutil.rmtree(output / "checkpoint-1")
    all_well(two(path))
    assert os.path.isdir(output / "checkpoint-5")
