"""Checkpoints of whole runs: in the background as when training waits, full disks, what stays, what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.errors import Interrupted, UserError
from sana_tune.run import run
from sana_tune.train import folders
from sana_tune.watch.events import Event, Finished, Noticed, Saved, Stepped
from tests.journeys.kit import Heard, differences, metrics_of, pictures, small_run, state_of
from tests.journeys.mounts import small_disk, with_own_mounts

STEPS = 5
SETTINGS: Mapping[str, Any] = {"max_train_steps": STEPS, "checkpoint_step_interval": 1, "checkpoints_total_limit": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, their caches, and in straight/ a run that waited for every checkpoint."""
    folder = tmp_path_factory.mktemp("saves")
    pictures(folder / "pictures", 4)
    run(small(folder, folder / "straight", checkpoint_writing="wait"))
    return folder


def small(home: Path, folder: Path, **settings: Any) -> Any:
    given = {**SETTINGS, "cache_dir": str(home / "cache"), **settings}
    return small_run(folder, {"instance_data_dir": str(home / "pictures")}, **given)


def outcome(output: Path) -> dict[str, Any]:
    """All that must be the same in the end."""
    found = {f"line {number}": line for number, line in enumerate(metrics_of(output))}
    for step in (STEPS - 1, STEPS):
        found |= {f"{step}/{name}": value for name, value in state_of(output / f"checkpoint-{step}").items()}
    return found


def test_in_the_background_all_comes_out_as_when_training_waits(home: Path, tmp_path: Path):
    heard = Heard()
    run(small(home, tmp_path), sinks=[heard])
    plans = [json.loads((where / "output/plan.json").read_bytes())["saving"] for where in (home / "straight", tmp_path)]
    assert [plan["background"] for plan in plans] == [False, True] and plans[1]["keeping"]["limit"] == 2
    assert [event.progress.step for event in heard.of(Saved)] == [1, 2, 3, 4, 5]
    assert differences(outcome(home / "straight/output"), outcome(tmp_path / "output")) == []
    said = (tmp_path / "output/log.txt").read_text(encoding="utf-8")
    assert "Checkpoints: every 1 steps, at the end: 21.0 MB each; kept: the newest 2; written in the background" in said


# ---- a disk that is full ----


def fill(disk: Path, left_bytes: int) -> None:
    """A file that leaves so much of a disk free."""
    with open(disk / "filler", "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - left_bytes)))


def on_small_disk(home: Path, folder: Path, life: Callable[[Path], None]) -> str:
    """Do something in a process that has a disk of 120 MB at folder/disk. Answers what it said."""

    def child() -> int:
        small_disk(folder / "disk", 120_000_000)
        life(folder / "disk")
        return 0

    ended = with_own_mounts(child, folder / "console.txt")
    assert ended.wait() == 0, ended
    assert "Traceback" not in str(ended) and "Logging error" not in str(ended)
    return str(ended)


def on_disk(home: Path, folder: Path, disk: Path, **settings: Any) -> Any:
    """The run with its folder on the disk. Three checkpoints stay, so that the third finds none that goes before it."""
    return small(home, folder, output_dir=str(disk / "output"), **{"checkpoints_total_limit": 3, **settings})


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if "checkpoint-" in path.name)


def sound(output: Path) -> list[int]:
    """Steps of the complete checkpoints, all of which must verify; and nothing half done may be there."""
    complete = folders.list_complete(output)
    assert len(complete) == len(names(output)) and not any(folders.damage(each) for each in complete)
    return [each.step for each in complete]


@pytest.mark.parametrize("writing", ["background", "wait"])
@pytest.mark.parametrize("moment", ["before", "during"])
def test_on_a_full_disk_it_waits_and_goes_on_when_there_is_room(home: Path, tmp_path: Path, writing: str, moment: str):
    """Filled before a save, or while the optimizer's state is written: the old ones stay, nothing is lost after."""

    def life(disk: Path) -> None:
        told = list[str]()

        def then(event: Event) -> None:
            if isinstance(event, Saved) and event.progress.step == 2 and moment == "before":
                fill(disk, 1_000_000)
            if isinstance(event, Noticed):
                told.append(event.message)
                if "until there is room" in event.message:
                    assert 2 in sound(disk / "output")
                    (disk / "filler").unlink()

        if moment == "during":
            fill_at(disk, f"{disk}/output/.checkpoint-3.", "/optimizer.pt")
        heard = Heard(then)
        loaded = on_disk(home, tmp_path, disk, checkpoint_writing=writing)
        run(loaded, sinks=[heard])
        assert len(told) == 2 and "checkpoint-3 needs" in told[0] and "There is room again" in told[1]
        assert [event.progress.step for event in heard.of(Saved)] == [1, 2, 3, 4, 5] and len(heard.of(Finished)) == 1
        assert sound(disk / "output") == [3, 4, 5]
        assert differences(outcome(home / "straight/output"), outcome(disk / "output")) == []

    on_small_disk(home, tmp_path, life)


def fill_at(disk: Path, begin: str, end: str) -> None:
    """Fill a disk to the last byte when a file is opened for the first time."""
    turns = iter([True])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event == "open" else ""
        if path.startswith(begin) and path.endswith(end) and next(turns, False):
            try:
                fill(disk, 0)
                with open(disk / "filler", "ab", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            except OSError:
                pass

    sys.addaudithook(hook)


def test_ctrl_c_leaves_a_run_that_waits_for_room_and_it_goes_on_later(home: Path, tmp_path: Path):
    def life(disk: Path) -> None:
        def then(event: Event) -> None:
            if isinstance(event, Saved) and event.progress.step == 2:
                fill(disk, 1_000_000)
            if isinstance(event, Noticed) and "until there is room" in event.message:
                os.kill(os.getpid(), signal.SIGINT)

        loaded = on_disk(home, tmp_path, disk)
        with pytest.raises(Interrupted) as ended:
            run(loaded, sinks=[Heard(then)])
        assert ended.value.exit_code == 130 and sound(disk / "output") == [1, 2]
        (disk / "filler").unlink()
        run(loaded)
        assert differences(outcome(home / "straight/output"), outcome(disk / "output")) == []

    assert "the newest is of step 2" in on_small_disk(home, tmp_path, life)


def test_with_stop_it_ends_and_with_script_the_script_makes_room(home: Path, tmp_path: Path):
    def life(disk: Path) -> None:
        def then(event: Event) -> None:
            if isinstance(event, Saved) and event.progress.step == 2:
                fill(disk, 35_000_000)  # a checkpoint would fit

        settings = {"disk_low_threshold": "40 MB", "max_train_steps": 4}
        with pytest.raises(UserError, match=r"checkpoint-3 needs 40.0 MB \(disk_low_threshold 40 MB\)"):
            run(on_disk(home, tmp_path, disk, disk_low_action="stop", **settings), sinks=[Heard(then)])
        assert sound(disk / "output") == [1, 2]
        remove = f"rm {disk}/filler"
        run(on_disk(home, tmp_path, disk, disk_low_action="script", disk_low_script=remove, **settings))
        assert not (disk / "filler").exists() and sound(disk / "output") == [2, 3, 4]

    on_small_disk(home, tmp_path, life)


# ---- what stays, and what comes out ----


def test_what_stays_is_what_the_plan_counts_and_the_list_tells(home: Path, tmp_path: Path, capsys):
    loaded = small(
        home, tmp_path, max_train_steps=9, checkpoint_step_interval=2, checkpoints_total_limit=1,
        checkpoints_keep_every=4, checkpointing_rolling_steps=3, checkpoint_writing="wait",
    )  # fmt: skip
    most = 0

    def then(event: Event) -> None:
        nonlocal most
        most = max(most, len(names(tmp_path / "output"))) if isinstance(event, (Saved, Stepped)) else most

    run(loaded, sinks=[Heard(then)])
    assert sound(tmp_path / "output") == [4, 8, 9], "9 is the last, and was saved as a rolling one"
    plan = json.loads((tmp_path / "output/plan.json").read_bytes())
    assert most <= plan["disk"]["kept"] == 5
    capsys.readouterr()
    assert exit_code(["checkpoint", "list", str(tmp_path / "output")]) == 0
    told = capsys.readouterr().out
    assert "checkpoint-4: epoch 2" in told and "kept: multiple of 4" in told and "9: epoch 4.5" in told


def test_the_exported_pipeline_of_any_checkpoint_draws(home: Path, tmp_path: Path, monkeypatch, capsys):
    """Raw and averaged weights differ, are those of the checkpoint, and diffusers draws with them; no data needed."""
    from diffusers import SanaPipeline
    from safetensors.torch import load_file

    run(small(home, tmp_path / "run", use_ema=True, checkpoints_total_limit=0, max_train_steps=3))
    shutil.rmtree(tmp_path / "run/multidatabackend.json", ignore_errors=True)
    (tmp_path / "run/multidatabackend.json").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    checkpoint = "run/output/checkpoint-2"
    assert exit_code(["export", "--checkpoint", checkpoint, "--output", "raw"]) == 0
    assert (
        exit_code(["export", "--checkpoint", "latest", "--config", "run/config.json", "--output", "ema", "--ema"]) == 0
    )
    for out, place in (("raw", f"{checkpoint}/transformer"), ("ema", "run/output/checkpoint-3/transformer_ema")):
        file = "diffusion_pytorch_model.safetensors"
        assert differences(load_file(f"{out}/transformer/{file}"), load_file(f"{place}/{file}")) == []
        assert not Path(out, "transformer_ema").exists()
    drawn = {}
    for out in ("raw", "ema"):
        code = (tmp_path / out / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        assert "SanaPipeline.from_pretrained" in code
        exec(compile(code, "README.md", "exec"), {})
        drawn[out] = Path("picture.png").read_bytes()
        assert type(SanaPipeline.from_pretrained(out)).__name__ == "SanaPipeline"
    assert drawn["raw"] != drawn["ema"] and min(map(len, drawn.values())) > 100
    capsys.readouterr()
    assert exit_code(["export", "--checkpoint", checkpoint, "--output", "raw"]) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert exit_code(["export", "--checkpoint", checkpoint, "--output", "raw", "--ema", "--overwrite"]) == 0
    average = load_file(f"{checkpoint}/transformer_ema/diffusion_pytorch_model.safetensors")
    assert differences(load_file("raw/transformer/diffusion_pytorch_model.safetensors"), average) == []
