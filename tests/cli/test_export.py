"""`sana_tune export`: what is wrong with the words is told before torch is there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from tests.config.helpers import write_files
from tests.train.test_folders import fake


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a refused export says."""
    capsys.readouterr()
    assert exit_code(["export", *words]) == 1
    return capsys.readouterr().err


def test_without_a_folder_nothing_is_exported(capsys: pytest.CaptureFixture[str]):
    assert "must name the folder of the pipeline" in said(capsys, "--merge")


def test_whole_weights_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = str(write_files(tmp_path))
    fake(tmp_path / "output", 5)
    told = said(capsys, "--config", config, "--output", str(tmp_path / "out"), "--merge")
    assert "--merge: merging is for adapters; this checkpoint holds whole weights" in told


def test_what_stands_in_the_way_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = str(write_files(tmp_path))
    out = tmp_path / "out"
    told = said(capsys, "--config", config, "--output", str(out))
    assert "--checkpoint latest: there is no complete checkpoint" in told and not out.exists()
    fake(tmp_path / "output", 5)
    told = said(capsys, "--config", config, "--output", str(out), "--ema")
    assert "has no averaged weights" in told and "leave --ema out" in told
    (tmp_path / "else").mkdir()
    (tmp_path / "else/mine.txt").touch()
    told = said(capsys, "--config", config, "--output", str(tmp_path / "else"), "--overwrite", "--checkpoint", "x")
    assert "something else than a pipeline" in told and "there is no such checkpoint" in told
    assert (tmp_path / "else/mine.txt").exists()


def test_of_a_checkpoints_path_the_runs_own_settings_are_taken(tmp_path: Path, monkeypatch, capsys):
    """Not those of the working directory, and without the datasets; a file that is damaged is never exported."""
    write_files(tmp_path, {"pretrained_model_name_or_path": "no/such-model"})
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "elsewhere"
    path = fake(own / "output", 5)
    shutil.move(write_files(own), own / "output/config.json")
    for name in ("multidatabackend.json", "pictures"):
        shutil.rmtree(own / name) if (own / name).is_dir() else (own / name).unlink()
    (path / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"weightz")
    told = said(capsys, "--checkpoint", str(path), "--output", str(tmp_path / "out"))
    assert "damaged: transformer/diffusion_pytorch_model.safetensors is not as it was saved" in told
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]):
    import subprocess

    code = "import sys; from sana_tune.cli.main import exit_code; exit_code(['export', '--help']); " \
           "assert 'torch' not in sys.modules"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
