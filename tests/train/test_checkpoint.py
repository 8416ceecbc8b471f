"""Checkpoints: bit-exact, whole or not there, of this run or refused."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana_tune.errors import UserError
from sana_tune.progress import Every, Progress
from sana_tune.saving import Keeping
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.step import Parts, train_step
from sana_tune.train.writing import OPTIMIZER
from sana_tune.watch.events import Saved
from tests.train.toys import ToyBatches, differences, files_of, make_parts, state_of, tiny_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


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


def test_the_optimizers_file_can_be_mapped(tmp_path: Path):
    """On a GPU each of several processes reads it so; here it is that such a file is one that torch can map."""
    save(Checkpoints(tmp_path), trained(), Progress(3))
    path = newest(tmp_path).path / OPTIMIZER
    plain, mapped = (torch.load(path, weights_only=True, mmap=mmap)["state"] for mmap in (False, True))
    found = {(name, key): value for name, held in plain.items() for key, value in held.items()}
    assert len(found) > 10 and plain.keys() == mapped.keys()
    for (name, key), value in found.items():
        other = mapped[name][key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


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


@pytest.mark.parametrize("harm", ["cut short", "one bit", "emptied", "gone", "a folder"])
@pytest.mark.parametrize("kind", ["transformer/config.json", f"transformer/{WEIGHTS}", OPTIMIZER, "progress.json"])
def test_each_kind_of_file_that_is_torn_or_garbled_is_found(shared: Path, tmp_path: Path, kind: str, harm: str):
    """One is never restored; where the size tells, the one before is taken."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-2" / kind
    data = bytearray(path.read_bytes())
    path.unlink()
    if harm == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "one bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "emptied":
        path.touch()
    elif harm == "a folder":
        path.mkdir()
    found = newest(tmp_path)
    if harm == "one bit":
        assert found.step == 2 and folders.damage(found) == [kind]
        with pytest.raises(UserError, match="damaged"):
            Checkpoints(tmp_path).restore(make_parts(), found)
    else:
        assert found.step == 1
        assert Checkpoints(tmp_path).restore(make_parts(), found) == Progress(1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, to be copied."""
    output, parts = tmp_path_factory.mktemp("shared"), trained(1)
    for step in (1, 2):
        save(Checkpoints(output), parts, Progress(step))
    return output


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 2, "serial": 2, "files": []}', "\0\0\0\0", '{"step": 2}'])
def test_a_garbled_manifest_is_no_checkpoint(shared: Path, tmp_path: Path, text: str):
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-2/manifest.json").write_text(text, encoding="utf-8")
    assert newest(tmp_path).step == 1


# ---- what stays ----


def keep_all_of(tmp_path: Path, keeping: Keeping, losses: dict[int, float], rolling: tuple[int, ...] = ()) -> list[str]:
    """Save eight steps and judge some; what is there in the end."""
    parts, checkpoints = trained(1), Checkpoints(tmp_path, keeping)
    for step in range(1, 9):
        save(checkpoints, parts, Progress(step), rolling=step in rolling)
        if step in losses:
            checkpoints.judge(Progress(step), losses[step])
    return [name.removeprefix("checkpoint-") for name in names(tmp_path) if name.startswith("checkpoint-")]


def test_multiples_stay_beside_the_newest(tmp_path: Path):
    assert keep_all_of(tmp_path, Keeping(2, every=3), {}) == ["3", "6", "7", "8"]


def test_the_best_stay_and_a_better_one_takes_their_place(tmp_path: Path):
    losses = {1: 0.9, 2: 0.5, 3: 0.7, 4: 0.6, 5: 0.8, 6: float("nan"), 7: 0.9}
    assert keep_all_of(tmp_path, Keeping(1, best=2), losses) == ["2", "4", "8"]
    assert json.loads((tmp_path / "checkpoint_scores.json").read_text())["held_out"]["2"] == 0.5


def test_rolling_ones_have_a_limit_of_their_own(tmp_path: Path):
    kept = keep_all_of(tmp_path, Keeping(2, rolling_every=1, rolling_limit=1), {}, rolling=(1, 3, 5, 6, 7))
    assert kept == ["4", "7", "8"]
    assert [each.rolling for each in folders.list_complete(tmp_path)] == [False, True, False]


def test_what_was_measured_survives_a_resume_but_not_a_course_that_was_left(tmp_path: Path):
    keep_all_of(tmp_path, Keeping(0), {2: 0.5, 5: 0.1})
    checkpoints = Checkpoints(tmp_path, Keeping(1, best=1))
    checkpoint = folders.find(tmp_path, "checkpoint-4")
    parts = make_parts()
    assert checkpoints.restore(parts, checkpoint).step == 4
    save(checkpoints, parts, Progress(5))
    kept = {each.step for each in folders.list_complete(tmp_path)}
    assert kept == {2, 5}, "step 5 of the course that was left is no measure of this one's"


def test_saving_is_due_by_steps_by_epochs_and_rolling(tmp_path: Path):
    parts, told = trained(1), list[Any]()
    checkpoints = Checkpoints(tmp_path, Keeping(0, rolling_every=2))
    with checkpoints.telling(told.append, lambda: False):
        for step in range(1, 9):
            checkpoints.save_due(Every(4, 1), parts, Progress(step, step / 3), lambda step: step / 3)
    assert [event.progress.step for event in told] == [2, 3, 4, 6, 8]
    assert [each.step for each in folders.list_complete(tmp_path) if each.rolling] == [2], "6 is an epoch's end"
