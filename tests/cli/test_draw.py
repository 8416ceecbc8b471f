"""The words of `sana_tune validate` and `sana_tune generate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.cli.draw import as_settings, sorted_out
from sana_tune.cli.main import exit_code
from tests.journeys.kit import one_thread, pictures, small_run
from tests.test_drawing import DRAWING


@pytest.mark.parametrize(
    ("words", "texts", "settings"),
    [
        (["a red star"], ["a red star"], []),
        (["--learning_rate", "1e-5", "a star", "b"], ["a star", "b"], ["--learning_rate", "1e-5"]),
        (["a", "seed=5", "--use_ema"], ["a"], ["seed=5", "--use_ema"]),
        (["--x=1", "a = b", "--y", "--z", "2"], ["a = b"], ["--x=1", "--y", "--z", "2"]),
    ],
)
def test_prompts_and_settings_are_told_apart(words, texts, settings):
    assert sorted_out(words) == (texts, settings)


def test_flags_become_settings():
    assert as_settings({"validation_seed": "5", "validation_guidance": None}) == ["--validation_seed=5"]


def test_the_commands(tmp_path: Path, capsys):
    pictures(tmp_path / "pictures", 2)
    small_run(tmp_path, **DRAWING, max_train_steps=1, disable_benchmark=True)
    config = str(tmp_path / "config.json")
    with one_thread():
        assert exit_code(["train", "--config", config]) == 0
        shown = tmp_path / "output/validation_images"
        before = (shown / "step_1_validation_0_32x32.png").read_bytes()
        (shown / "step_1_validation_0_32x32.png").unlink()
        assert exit_code(["validate", "--config", config, "--checkpoint", "latest"]) == 0
        assert (shown / "step_1_validation_0_32x32.png").read_bytes() == before
        flags = [
            "--seed",
            "7",
            "--steps",
            "1",
            "--guidance",
            "1",
            "--resolution",
            "32x64",
            "--output",
            str(tmp_path / "x.png"),
        ]
        assert exit_code(["generate", "--config", config, *flags, "a star"]) == 0
    assert (tmp_path / "x.png").is_file()
    capsys.readouterr()
    assert exit_code(["generate", "--config", config]) == 1
    assert 'sana_tune generate "a photo of' in capsys.readouterr().err
    assert exit_code(["generate", "--config", config, "--ema", "a star"]) == 1
    assert "this checkpoint has no averaged weights" in capsys.readouterr().err
    (shown / "step_1_validation_0_32x32.png").unlink()
    (shown / "step_1_validation_0_32x32.png").mkdir()
    assert exit_code(["validate", "--config", config]) == 1, "a picture that could not be drawn"
