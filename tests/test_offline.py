"""Pictures of a checkpoint without training: the run's own to the pixel, and what is wrong is told at once."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import Loaded
from sana_tune.errors import UserError
from sana_tune.offline import Asked, generate, validate
from sana_tune.prompts import slug
from sana_tune.run import run
from tests.journeys.kit import one_thread, pictures, small_run
from tests.test_drawing import DRAWING


def settings(home: Path, folder: Path | None = None, **more: Any) -> Loaded:
    """The config of the run in `home`, written to `folder`."""
    own = {**DRAWING, "use_ema": True, "max_train_steps": 2, "validation_step_interval": 0, "disable_benchmark": True}
    entry = {"instance_data_dir": str(home / "pictures")}
    return small_run(folder or home, entry, **{**own, "output_dir": str(home / "output"), **more})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A finished run, whose training pictures are gone."""
    folder = tmp_path_factory.mktemp("offline")
    pictures(folder / "pictures", 2)
    with one_thread():
        run(settings(folder, learning_rate=1e-2, validation_negative_prompt="grey"))
    for path in (folder / "pictures").iterdir():
        path.unlink()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_runs_own_pictures_come_out_again(home: Path, tmp_path: Path):
    kinds = ("AutoencoderDC", "Gemma2Model", "SanaTransformer2DModel")
    older = {id(each) for each in gc.get_objects() if type(each).__name__ in kinds}
    before = files(home / "output/validation_images")
    assert set(before) == {
        "step_2_validation_0_32x32.png", "step_2_validation_0_32x32_ema.png", "step_2_contact_sheet.png",
    }  # fmt: skip
    shutil.copytree(home / "output", tmp_path / "output")
    shutil.rmtree(tmp_path / "output/validation_images")
    loaded = settings(home, tmp_path, output_dir=str(tmp_path / "output"), validation_negative_prompt="grey")
    with one_thread():
        done = validate(loaded, Asked())
    assert done.progress.step == 2 and done.failed == () and done.sheet.endswith("step_2_contact_sheet.png")
    assert files(tmp_path / "output/validation_images") == before
    gc.collect()
    now = [each for each in gc.get_objects() if type(each).__name__ in kinds]
    assert not [each for each in now if id(each) not in older], "nothing stays in memory"


def test_new_prompts_are_encoded_and_leave_the_sheet_alone(home: Path, tmp_path: Path):
    sheet = home / "output/validation_images/step_2_contact_sheet.png"
    before = sheet.read_bytes()
    done = validate(settings(home, tmp_path), Asked("checkpoint-2", ("A Green Ring",), ("",)))
    (name,) = (Path(file).name for file in done.files)
    assert name.startswith("step_2_a-green-ring") and name.endswith("_0_32x32.png") and done.sheet == ""
    assert sheet.read_bytes() == before


def test_generate_draws_what_the_run_drew(home: Path, tmp_path: Path):
    loaded = settings(home, tmp_path, validation_negative_prompt="grey", num_validation_images=2)
    prompt = (DRAWING["validation_prompt"].upper(),)
    with one_thread():
        made = generate(loaded, Asked("latest", prompt, ("_ema",)), tmp_path / "out")
        (one,) = generate(settings(home, tmp_path), Asked("latest", ("x",), ("",)), tmp_path / "deep/one.webp")
        (kept,) = generate(settings(home, tmp_path), Asked("latest", ("x",), ("",)))
    name = f"step_2_{slug(prompt[0])}_seed"
    assert [path.name for path in made] == [f"{name}-11_32x32_ema.png", f"{name}-12_32x32_ema.png"]
    assert name.startswith("step_2_a-red-star-on-a-blue-background")
    assert made[0].read_bytes() == (home / "output/validation_images/step_2_validation_0_32x32_ema.png").read_bytes()
    assert one.read_bytes().startswith(b"RIFF") and kept.parent == home / "output/generated"


@pytest.mark.parametrize(
    ("asked", "more", "expected"),
    [
        (Asked("nowhere"), {}, ["--checkpoint nowhere: there is no such checkpoint", "checkpoint-2"]),
        (Asked(), {"output_dir": "empty"}, ["there is no complete checkpoint in empty"]),
        (Asked("nowhere", (" ",)), {"validation_resolution": "33"},
         ["--checkpoint nowhere", "must be a text that is not empty", "multiples of 32 px"]),
        (Asked(), {"validation_disable": True}, ["there is no prompt to draw"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_all_at_once(asked, more, expected, home: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        validate(settings(home, tmp_path, **more), asked)
    assert len(caught.value.problems) == max(1, len([part for part in expected if not part.startswith("checkpoint-")]))
    assert [part for part in expected if part not in str(caught.value)] == []


def test_a_checkpoint_that_cannot_be_drawn_with(home: Path, tmp_path: Path):
    copy = tmp_path / "output"
    shutil.copytree(home / "output/checkpoint-2", copy / "checkpoint-2")
    loaded = settings(home, tmp_path, output_dir=str(copy))
    header = copy / "checkpoint-2/progress.json"
    whole = header.read_text(encoding="utf-8")
    header.write_text(whole.replace('"nano"', '"namo"'), encoding="utf-8")
    with pytest.raises(UserError, match="it was trained from namo; the config names nano"):
        generate(loaded, Asked("latest", ("x",)))
    header.write_text(whole, encoding="utf-8")
    weights = copy / "checkpoint-2/transformer/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        generate(loaded, Asked("latest", ("x",)))
    with pytest.raises(UserError, match="one file cannot hold 2 pictures"):
        generate(settings(home, tmp_path), Asked("latest", ("x", "y"), ("",)), tmp_path / "one.png")
