"""Runs with a quantised text encoder: embeddings and keys of its own, the same pictures offline, clear refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.offline import Asked, validate
from sana_tune.run import run, warm
from tests.journeys.kit import cache_of, output_of, pictures, small_run
from tests.test_drawing import DRAWING


def cached(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return cache_of(folder / "output/cache/text")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def test_a_quantised_encoder_makes_embeddings_of_its_own(tmp_path: Path):
    pictures(tmp_path / "pictures", 2)
    warm(small_run(tmp_path))
    plain = cached(tmp_path)
    loaded = small_run(tmp_path, text_encoder_1_precision="nf4-bnb")
    warm(loaded)
    both = cached(tmp_path)
    packed = {key: value for key, value in both.items() if key not in plain}
    assert len(packed) == len(plain) > 0, "each text once more, under another key"
    log = (output_of(loaded) / "log.txt").read_text()
    assert "Text encoder: 14 layers in nf4-bnb" in log and "not quantised: token embeddings" in log
    warm(small_run(tmp_path, text_encoder_1_precision="nf4-bnb", quantize_via="accelerator"))
    assert cached(tmp_path).keys() == both.keys(), "nothing is made again"
    shapes = [sorted(value[:2] for value in each.values()) for each in (plain, packed)]
    assert shapes[0] == shapes[1]
    assert not {value[2] for value in plain.values()} & {value[2] for value in packed.values()}


def test_pictures_are_drawn_offline_with_the_quantised_encoder(tmp_path: Path):
    pictures(tmp_path / "pictures", 2)
    own = {**DRAWING, "max_train_steps": 1, "validation_step_interval": 0, "disable_benchmark": True}
    loaded = small_run(tmp_path, **own, text_encoder_1_precision="int8-bnb")
    run(loaded)
    drawn = output_of(loaded) / "validation_images"
    before = {path.name: path.read_bytes() for path in drawn.glob("step_1_*.png")}
    assert before
    for path in [*drawn.iterdir(), *(output_of(loaded) / "cache/text").iterdir()]:
        path.unlink()
    assert validate(loaded, Asked()).failed == ()
    assert {path.name: path.read_bytes() for path in drawn.glob("step_1_*.png")} == before


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
@pytest.mark.parametrize("command", ["check", "train"])
def test_what_is_not_installed_is_told_before_anything_is_loaded(tmp_path: Path, command: str, capsys):
    pictures(tmp_path / "pictures", 2)
    loaded = small_run(tmp_path, text_encoder_1_precision="int8-torchao")
    assert exit_code([command, "--config", str(loaded.path)]) == 1
    told = said(capsys)
    assert "text_encoder_1_precision: int8-torchao needs the package torchao, which is not installed" in told
    assert "pip install torchao, or use int8-bnb or nf4-bnb" in told
    assert not (output_of(loaded) / "cache/text").exists()


def test_a_full_run_on_a_quantised_base_is_refused_with_numbers(tmp_path: Path, capsys):
    pictures(tmp_path / "pictures", 2)
    loaded = small_run(tmp_path)
    words = ["check", "--config", str(loaded.path), "--base_model_precision", "nf4-bnb"]
    assert exit_code(words) == 1
    told = said(capsys)
    assert "a quantised base must be frozen" in told and "lora_type lycoris, about 1.0 GB" in told
    assert "(estimates for 32 px, batch 2)" in told
