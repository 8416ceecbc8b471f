"""Checkpoints: bit-exact, whole or not there, of this run or refused."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file

from sana_tune.errors import UserError
from sana_tune.progress import Progress
from sana_tune.saving import Keeping
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.step import Parts, train_step
from sana_tune.train.writing import OPTIMIZER, WEIGHTS
from sana_tune.watch.events import Saved
from tests.train.toys import ToyBatches, differences, files_of, make_parts, state_of, tiny_transformer


def trained(steps: int = 3, **settings) -> Parts:
    parts = make_parts(**settings)
    progress = Progress()
    for micro_batches in ToyBatches().steps(0, steps):
        result = train_step(parts, micro_batches, progress)
        progress = progress.advance(result.images, 0.0)
    return parts


def save(checkpoints: Checkpoints, parts: Parts, progress: Progress, **how: Any) -> Saved:
    """Save and wait. Answers what was told."""
    told: list[Any] = []
    with checkpoints.telling(told.append, lambda: False):
        checkpoints.save(parts, progress, **how)
    (saved,) = told
    assert isinstance(saved, Saved)
    return saved


def newest(output: Path) -> folders.Checkpoint:
    found = folders.find(output, "latest")
    assert found is not None
    return found


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["optimi-adamw", "torch-adamw"])
def test_what_is_restored_is_what_was_saved_byte_for_byte(tmp_path: Path, optimizer: str, dtype: torch.dtype):
    parts = trained(optimizer=optimizer, dtype=dtype)
    save(Checkpoints(tmp_path / "one"), parts, Progress(3, 1 / 3, 9))
    other = make_parts(optimizer=optimizer, dtype=dtype, transformer=tiny_transformer(seed=5))
    checkpoints = Checkpoints(tmp_path / "one")
    assert checkpoints.restore(other, newest(tmp_path / "one")) == Progress(3, 1 / 3, 9)
    assert differences(state_of(parts), state_of(other)) == []
    save(Checkpoints(tmp_path / "two"), other, Progress(3, 1 / 3, 9))
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] == []


def test_the_layout_of_the_contract(tmp_path: Path):
    parts = trained()
    saved = save(Checkpoints(tmp_path, identity={"model": "toy"}), parts, Progress(3, 1.0, 9))
    path = tmp_path / "checkpoint-3"
    assert saved.path == str(path) and saved.removed == () and saved.progress.step == 3
    assert sorted(files_of(path)) == [
        "manifest.json", "optimizer.pt", "progress.json", "transformer/config.json", f"transformer/{WEIGHTS}",
        "transformer_ema/config.json", f"transformer_ema/{WEIGHTS}",
    ]  # fmt: skip
    state = torch.load(path / OPTIMIZER, weights_only=True)
    assert set(state) == {"state", "param_groups"}
    held = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    assert held == {"step": 3, "epoch": 1.0, "images": 9, "run": {"model": "toy"}}
    assert names(tmp_path) == ["checkpoint-3"]


def test_diffusers_loads_both_models(tmp_path: Path):
    parts = trained()
    save(Checkpoints(tmp_path), parts, Progress(3))
    for part, state in (("transformer", parts.bare.state_dict()), ("transformer_ema", parts.ema.state_dict())):
        model = SanaTransformer2DModel.from_pretrained(tmp_path / "checkpoint-3" / part)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_without_ema_there_is_none(tmp_path: Path):
    save(Checkpoints(tmp_path), trained(1, ema_decay=None), Progress(1))
    assert not (tmp_path / "checkpoint-1" / "transformer_ema").exists()


def test_ema_switched_on_or_off_between_runs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    without, having = trained(2, ema_decay=None), trained(2)
    save(Checkpoints(tmp_path / "without"), without, Progress(2))
    save(Checkpoints(tmp_path / "having"), having, Progress(2))
    parts = make_parts()
    with caplog.at_level("WARNING", "sana_tune"):
        Checkpoints(tmp_path / "without").restore(parts, newest(tmp_path / "without"))
        assert "has no EMA" in caplog.text
        assert all(torch.equal(value, parts.bare.state_dict()[name]) for name, value in parts.ema.state_dict().items())
        Checkpoints(tmp_path / "having").restore(make_parts(ema_decay=None), newest(tmp_path / "having"))
    assert "use_ema is off" in caplog.text


def test_nothing_to_restore_is_the_start(tmp_path: Path):
    parts = make_parts()
    before = state_of(parts)
    assert Checkpoints(tmp_path / "absent").restore(parts, None) == Progress()
    assert differences(before, state_of(parts)) == []


def test_the_same_step_is_not_saved_twice(tmp_path: Path):
    parts = trained(1)
    checkpoints = Checkpoints(tmp_path)
    again, told = Checkpoints(tmp_path), []
    with checkpoints.telling(told.append, lambda: False):
        assert checkpoints.finish(parts, Progress()) and told == []
        assert checkpoints.finish(parts, Progress(1)) and checkpoints.finish(parts, Progress(1))
    again.restore(make_parts(), newest(tmp_path))
    with again.telling(told.append, lambda: False):
        assert again.finish(parts, Progress(1)) and again.finish(parts, Progress(2))
    assert [event.progress.step for event in told] == [1, 2]


def test_the_limit_holds_and_is_told(tmp_path: Path):
    parts, checkpoints = trained(1), Checkpoints(tmp_path, Keeping(2))
    removed = [save(checkpoints, parts, Progress(step)).removed for step in (1, 2, 3, 4)]
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert [[Path(path).name for path in each] for each in removed] == [[], [], ["checkpoint-1"], ["checkpoint-2"]]


class Peeking:
    """Looks which checkpoints stand whenever weights begin to be written."""

    hooked: Peeking | None = None

    def __init__(self, output: Path):
        self.output = output
        self.seen: list[str] = []
        if Peeking.hooked is None:
            sys.addaudithook(Peeking.hear)  # there is no way to take one away
        Peeking.hooked = self

    @staticmethod
    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        self = Peeking.hooked
        if event == "open" and self is not None and str(arguments[0]).endswith(f"/transformer/{WEIGHTS}"):
            if f"{self.output}/.checkpoint" in str(arguments[0]):
                self.seen = [name for name in names(self.output) if not name.startswith(".")]


def test_a_limit_of_one_keeps_the_old_one_until_the_new_one_stands(tmp_path: Path):
    parts, checkpoints, peeking = trained(1), Checkpoints(tmp_path, Keeping(1)), Peeking(tmp_path)
    save(checkpoints, parts, Progress(1))
    save(checkpoints, parts, Progress(2))
    assert peeking.seen == ["checkpoint-1"] and names(tmp_path) == ["checkpoint-2"]


def test_pruning_comes_before_writing_but_spares_the_newest_verified(tmp_path: Path):
    """Two damaged checkpoints are newer than the sound one: the sound one stays, whatever the limit."""
    parts, peeking = trained(1), Peeking(tmp_path)
    for step in (1, 2, 3):
        save(Checkpoints(tmp_path), parts, Progress(step))
    for step in (2, 3):
        path = tmp_path / f"checkpoint-{step}" / "transformer" / WEIGHTS
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    save(Checkpoints(tmp_path, Keeping(2)), parts, Progress(4))
    assert peeking.seen == ["checkpoint-1", "checkpoint-3"]
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_no_limit_keeps_all_and_foreign_folders_are_left_alone(tmp_path: Path):
    parts, checkpoints = trained(1), Checkpoints(tmp_path, Keeping(0))
    (tmp_path / "checkpoint-0").mkdir()
    for step in (1, 2, 3):
        save(checkpoints, parts, Progress(step))
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_step_reached_again_replaces_its_checkpoint_and_is_the_newest(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, trained(1), Progress(step))
    other = trained(2)
    save(checkpoints, other, Progress(1))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"] and newest(tmp_path).step == 1
    parts = make_parts()
    Checkpoints(tmp_path).restore(parts, newest(tmp_path))
    assert differences(state_of(other), state_of(parts)) == []


def test_a_damaged_checkpoint_is_refused_and_the_parts_are_untouched(tmp_path: Path):
    save(Checkpoints(tmp_path), trained(), Progress(3))
    path = tmp_path / "checkpoint-3" / OPTIMIZER
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    parts = make_parts()
    before = state_of(parts)
    with pytest.raises(UserError, match=r"damaged: optimizer\.pt"):
        Checkpoints(tmp_path).restore(parts, newest(tmp_path))
    assert differences(before, state_of(parts)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer": "wider"}, "this run's is"),
        ({"transformer": "normed"}, "on one side only"),
        ({"dtype": torch.bfloat16}, r"float32, this run's is \[.*\] bfloat16"),
        ({"optimizer": "torch-adamw"}, "another optimizer"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, settings: dict, message: str):
    save(Checkpoints(tmp_path), trained(), Progress(3))
    kinds = {"wider": {"mlp_ratio": 3.0}, "normed": {"qk_norm": "rms_norm_across_heads"}}
    if "transformer" in settings:
        settings = {"transformer": tiny_transformer(**kinds[settings["transformer"]])}
    with pytest.raises(UserError, match=message) as caught:
        Checkpoints(tmp_path).restore(make_parts(**settings), newest(tmp_path))
    assert "output_dir" in caught.value.problems[0].fix


def test_another_identity_is_refused_with_each_difference(tmp_path: Path):
    save(Checkpoints(tmp_path, identity={"model": "a", "model_type": "full", "old": 1}), trained(1), Progress(1))
    with pytest.raises(UserError) as caught:
        identity = {"model": "b", "model_type": "lora", "new": 2}
        Checkpoints(tmp_path, identity=identity).restore(make_parts(), newest(tmp_path))
    assert [problem.what for problem in caught.value.problems] == [
        "trained with model 'a'; this run has 'b'",
        "trained with model_type 'full'; this run has 'lora'",
    ]


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path):
    """A limit on the size of files stands in for the disk's end, first in the weights, then in the optimizer state."""
    parts = trained()
    checkpoints = Checkpoints(tmp_path, Keeping(1))
    save(checkpoints, parts, Progress(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    weights = (tmp_path / "checkpoint-1" / "transformer" / WEIGHTS).stat().st_size
    for limit in (weights // 2, weights + 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="could not be written") as caught:
                save(checkpoints, parts, Progress(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path / "checkpoint-2") in caught.value.problems[0].where
        assert names(tmp_path) == ["checkpoint-1"]
    folders.verify(newest(tmp_path))


def save_for_ever(output: Path, parts: Parts, ready: int) -> None:
    """What the killed process does: go on from the newest checkpoint and save each step, marked with its number."""
    checkpoints = Checkpoints(output, Keeping(2))
    progress = checkpoints.restore(parts, folders.find(output, "latest"))
    os.write(ready, b"!")
    while True:
        progress = progress.advance(1, 0.0)
        with torch.no_grad():
            for parameter in parts.trained:
                parameter.fill_(progress.step)
        parts.ema.reset()
        save(checkpoints, parts, progress)


def test_twenty_kills_while_saving(tmp_path: Path, full: bool):
    """Killed at any moment, the newest complete checkpoint verifies, holds one step's values, and is never lost."""
    parts = trained(1)
    timed = Checkpoints(tmp_path / "timed")
    save_s = min(0.1, *(save(timed, parts, Progress(step)).duration_s for step in (1, 2)))
    output = tmp_path / "output"
    output.mkdir()
    chance = random.Random(4)
    landed, reached = 0, 0
    for _ in range(100 if full else 20):
        receiving, sending = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: a fork with threads around
            child = os.fork()
        if child == 0:
            try:
                save_for_ever(output, parts, sending)
            finally:
                os._exit(3)
        os.read(receiving, 1)
        time.sleep(chance.uniform(0.0, 3 * save_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it was killed, it did not fail"
        os.close(receiving)
        os.close(sending)

        landed += any(path.name.startswith(".checkpoint") for path in output.iterdir())
        complete = folders.list_complete(output)
        assert len(complete) <= 3
        assert reached == 0 or complete, "a checkpoint was there and is gone"
        if complete:
            folders.verify(complete[-1])
            assert complete[-1].step >= reached
            reached = complete[-1].step
            assert complete[-1].progress() == Progress(reached, 0.0, reached)
            for part in ("transformer", "transformer_ema"):
                weights = load_file(complete[-1].path / part / WEIGHTS)
                assert all((tensor == reached).all() for tensor in weights.values())
    assert landed >= 5, f"only {landed} kills landed inside a write"
    assert reached >= 5, f"only {reached} steps were saved between the kills"
    folders.clean(output)
    assert all(name.startswith("checkpoint-") for name in names(output))
