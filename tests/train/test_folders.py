"""Checkpoint folders without torch: which is complete, which is the newest, how they come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_tune.errors import UserError
from sana_tune.progress import Progress
from sana_tune.train import folders


def fake(output: Path, step: int, serial: int | None = None, content: bytes = b"weights") -> Path:
    """A complete checkpoint folder with one file of content."""
    path = output / folders.folder_name(step)
    (path / "transformer").mkdir(parents=True)
    (path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    (path / folders.PROGRESS).write_text(json.dumps(Progress(step, step / 3, step * 4).to_json()), encoding="utf-8")
    files = folders.digest_files(path, ["transformer/diffusion_pytorch_model.safetensors", folders.PROGRESS])
    manifest = {"step": step, "serial": step if serial is None else serial, "files": files}
    (path / folders.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def dead_process() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_latest_is_the_newest_complete_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (9, 100, 20):
        fake(tmp_path, step)
    (tmp_path / "checkpoint-300").mkdir()
    (tmp_path / "checkpoint-400").write_text("a file", encoding="utf-8")
    (tmp_path / ".checkpoint-500.tmp-1-ab").mkdir()
    (tmp_path / "checkpoint-600-old").mkdir()
    with caplog.at_level("WARNING", "sana_tune"):
        found = folders.find(tmp_path, "latest")
    assert found is not None and found.step == 100 and found.progress() == Progress(100, 100 / 3, 400)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'checkpoint-300'} is not complete and is passed over"
    ]


@pytest.mark.parametrize("harm", ["no manifest", "torn manifest", "missing file", "short file", "no progress"])
def test_what_is_not_complete(tmp_path: Path, harm: str):
    fake(tmp_path, 1)
    path = fake(tmp_path, 2)
    if harm == "no manifest":
        (path / folders.MANIFEST).unlink()
    elif harm == "torn manifest":
        (path / folders.MANIFEST).write_text('{"step": 2, "se', encoding="utf-8")
    elif harm == "missing file":
        (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    elif harm == "short file":
        (path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weigh")
    else:
        manifest = json.loads((path / folders.MANIFEST).read_text(encoding="utf-8"))
        del manifest["files"][folders.PROGRESS]
        (path / folders.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert folders.read(path) is None
    found = folders.find(tmp_path, "latest")
    assert found is not None and found.step == 1
    with pytest.raises(UserError, match="not a complete checkpoint"):
        folders.find(tmp_path, str(path))


def test_after_going_back_the_newest_save_is_the_latest(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fake(tmp_path, 100, serial=1)
    fake(tmp_path, 200, serial=2)
    fake(tmp_path, 150, serial=3)
    with caplog.at_level("WARNING", "sana_tune"):
        found = folders.find(tmp_path, "latest")
    assert found is not None and found.step == 150
    assert "checkpoint-200" in caplog.text


def test_nothing_to_resume(tmp_path: Path):
    assert folders.find(tmp_path, "latest") is None
    assert folders.find(tmp_path / "absent", "latest") is None
    fake(tmp_path, 1)
    assert folders.find(tmp_path, "") is None and folders.find(tmp_path, None) is None


def test_a_checkpoint_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = fake(tmp_path / "out", 5)
    monkeypatch.chdir(tmp_path)
    for wanted in (str(path), "checkpoint-5", "out/checkpoint-5", "out/checkpoint-5/"):
        found = folders.find(tmp_path / "out", wanted)
        assert found is not None and found.step == 5


def test_a_missing_path_is_told_with_what_there_is(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such checkpoint") as caught:
        folders.find(tmp_path, "checkpoint-7")
    assert "has none" in caught.value.problems[0].fix
    fake(tmp_path, 20)
    fake(tmp_path, 9)
    with pytest.raises(UserError) as caught:
        folders.find(tmp_path, str(tmp_path / "checkpoint-7"))
    problem = caught.value.problems[0]
    assert "checkpoint-7" in problem.where and problem.fix.endswith("checkpoint-9, checkpoint-20")


def test_verify_names_the_damaged_file(tmp_path: Path):
    path = fake(tmp_path, 1)
    found = folders.read(path)
    assert found is not None
    folders.verify(found)
    (path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weighty"[:7])
    assert folders.read(path) is not None, "the size is the same"
    with pytest.raises(UserError, match=r"damaged: transformer/diffusion_pytorch_model\.safetensors is not"):
        folders.verify(found)


def test_a_broken_progress_file_is_a_user_error(tmp_path: Path):
    path = fake(tmp_path, 1)
    (path / folders.PROGRESS).write_text("{}", encoding="utf-8")
    found = folders.Checkpoint(path, 1, 1, {})
    with pytest.raises(UserError, match="cannot be read"):
        found.progress()


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path: Path):
    fake(tmp_path, 4, content=b"old")
    staged = folders.aside(tmp_path, 4, "tmp")
    os.rename(fake(tmp_path / "other", 4, content=b"new"), staged)
    folders.publish(staged, tmp_path / "checkpoint-4", 4)
    assert names(tmp_path) == ["checkpoint-4", "other"]
    assert (tmp_path / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == b"new"


def test_cleaning_removes_what_dead_runs_left_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dead, alive = dead_process(), os.getppid()
    fake(tmp_path, 3)
    for kind in ("tmp", "old", "trash"):
        (tmp_path / f".checkpoint-3.{kind}-{dead}-0a").mkdir()
    for kept in (f".checkpoint-3.tmp-{alive}-0a", ".checkpoint-3.mine", "pipeline", "checkpoint-9"):
        (tmp_path / kept).mkdir()
    with caplog.at_level("INFO", "sana_tune"):
        folders.clean(tmp_path)
    assert names(tmp_path) == sorted(
        [f".checkpoint-3.tmp-{alive}-0a", ".checkpoint-3.mine", "pipeline", "checkpoint-3", "checkpoint-9"]
    )
    assert caplog.text.count("left behind by a killed run") == 3
    folders.clean(tmp_path / "absent")


@pytest.mark.parametrize("sound", [True, False])
def test_a_checkpoint_that_was_being_replaced_is_put_back_if_sound(tmp_path: Path, sound: bool):
    path = fake(tmp_path, 8)
    if not sound:
        (path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"WEIGHTS")
    os.rename(path, tmp_path / f".checkpoint-8.old-{dead_process()}-ff")
    folders.clean(tmp_path)
    assert names(tmp_path) == (["checkpoint-8"] if sound else [])


def test_removing_leaves_nothing(tmp_path: Path):
    found = folders.read(fake(tmp_path, 8))
    assert found is not None
    folders.remove(found)
    assert names(tmp_path) == []


def test_no_torch_is_needed():
    code = "import sys, sana_tune.train.folders; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
