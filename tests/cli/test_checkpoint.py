"""`sana_tune checkpoint list|verify`: what is told of a folder, of a run, and of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.train import folders
from sana_tune.train.judged import Judged
from tests.config.helpers import write_files
from tests.train.test_folders import fake


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints, of which one is rolling, and one that is not complete; a config that names them."""
    write_files(tmp_path, {"checkpoints_total_limit": 2, "checkpoints_keep_best": 1})
    output = tmp_path / "output"
    for step in (100, 200, 250, 300):
        path = fake(output, step)
        manifest = json.loads((path / folders.MANIFEST).read_text(encoding="utf-8"))
        manifest |= {"rolling": True} if step == 250 else {}
        (path / folders.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    (output / "checkpoint-400").mkdir()
    Judged(output).add(100, 0.25)
    Judged(output).add(200, 0.5)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert exit_code(["checkpoint", *words]) == code
    out = capsys.readouterr()
    return out.out if code == 0 or out.out else out.err


def test_the_list_says_what_each_is_and_why_it_stays(run: Path, capsys: pytest.CaptureFixture[str]):
    lines = told(capsys, "list", "--config", str(run / "config.json")).splitlines()
    assert lines[0] == f"{run / 'output'}: 4 complete, 340 B" or "4 complete" in lines[0]
    assert lines[1].startswith("  checkpoint-100: epoch 33.33, 20") and "(weights)" in lines[1]
    assert lines[1].endswith("held-out loss 0.25 (place 1), kept: best 1")
    assert lines[2].endswith("held-out loss 0.5 (place 2), kept: newest 2")
    assert lines[3].endswith("rolling, kept: newest 1 rolling") and lines[4].endswith("kept: newest; newest 2")
    assert lines[5].startswith("  checkpoint-400: not complete") and len(lines) == 6


def test_what_the_next_save_removes_is_said(run: Path, capsys: pytest.CaptureFixture[str]):
    words = ("list", "--config", str(run / "config.json"), "--checkpoints_keep_best", "0")
    assert "checkpoint-100" in next(line for line in told(capsys, *words).splitlines() if "goes with the next" in line)


def test_a_folder_alone_is_enough(run: Path, capsys: pytest.CaptureFixture[str]):
    listed = told(capsys, "list", str(run / "output"))
    assert "4 complete" in listed and "kept" not in listed.splitlines()[1], "nobody knows the run's settings"
    (run / "output/config.json").write_text((run / "config.json").read_text(), encoding="utf-8")
    assert "kept: best 1" in told(capsys, "list", str(run / "output"))
    assert told(capsys, "list", str(run / "pictures")) == f"no checkpoints in {run / 'pictures'}\n"
    assert told(capsys, "verify", str(run / "output/checkpoint-100")).endswith("checkpoint-100: ok\n")


def test_json_for_machines(run: Path, capsys: pytest.CaptureFixture[str]):
    found = json.loads(told(capsys, "list", str(run / "output"), "--json"))
    assert [entry.get("step") for entry in found] == [100, 200, 250, 300, None]
    assert found[0]["held_out"] == 0.25 and found[0]["best"] == 1 and found[0]["kept"] is None
    assert found[2]["rolling"] is True and found[3]["newest"] is True and found[3]["parts"] == ["weights"]
    assert found[4] == {"path": str(run / "output/checkpoint-400"), "complete": False}


def test_verify_reads_all_and_ends_with_1_when_anything_is_wrong(run: Path, capsys: pytest.CaptureFixture[str]):
    words = ("verify", "--config", str(run / "config.json"))
    assert "checkpoint-400: not complete" in told(capsys, *words, code=1)
    (run / "output/checkpoint-400").rmdir()
    assert told(capsys, *words).count(": ok\n") == 4
    path = run / "output/checkpoint-200/transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(b"weightz")
    assert "checkpoint-200: damaged: transformer/diffusion_pytorch_model.safetensors" in told(capsys, *words, code=1)
    found = json.loads(told(capsys, *words, "--json", code=1))
    assert found["ok"] is False and found["verified"] == 4 and found["incomplete"] == []
    assert found["damaged"] == {str(run / "output/checkpoint-200"): ["transformer/diffusion_pytorch_model.safetensors"]}


def test_a_garbled_position_is_no_reason_to_end_the_list(run: Path, capsys: pytest.CaptureFixture[str]):
    path = run / "output/checkpoint-100" / folders.PROGRESS
    path.write_bytes(b"x" * path.stat().st_size)
    assert "checkpoint-100: epoch ?" in told(capsys, "list", str(run / "output"))


def test_mistakes_are_told(run: Path, capsys: pytest.CaptureFixture[str]):
    assert "it is not there" in told(capsys, "list", str(run / "nowhere"), code=1)
    both = told(capsys, "list", str(run / "output"), "--config", str(run / "config.json"), code=1)
    assert "a folder stands alone" in both
