"""The user's folder after everything that is done with it: not a byte, not a name, not a time of change is another."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sana_tune.cli.main import exit_code
from sana_tune.errors import UserError
from sana_tune.run import run
from tests.data.pictures import encoded, noise, put
from tests.journeys.kit import metrics_of, output_of, pictures, small_run

SHUFFLED = {"caption_shuffle": {"enable": True, "count": 2, "split_on": "space"}}


def tree(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every file and folder: mode, time of the last change (a folder's changes with each entry), hash of the bytes."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, hashlib.sha256(data).hexdigest())
    return found


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    """Pictures as people have them, good and bad, in folders that cannot be written."""
    folder = tmp_path / "mine"
    pictures(folder / "trip", 5)
    put(folder, "A cat on a mat.png", 48, 32, caption="a cat on a mat, at night")
    (folder / "alpha.png").write_bytes(encoded(noise(40, 40, 3, channels=4)))
    (folder / "alpha.txt").write_text("a ghost")
    (folder / "empty.jpg").touch()
    (folder / "empty.txt").write_text("nothing")
    torn = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG", quality=95)
    (folder / "torn.jpg").write_bytes(torn[: len(torn) // 2])
    (folder / "torn.txt").write_text("torn")
    (folder / "film.mp4").write_bytes(b"film")
    (folder / ".hidden").write_bytes(b"hidden")
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    yield folder
    for path in folders:
        path.chmod(stat.S_IRWXU)


def test_a_whole_run_a_check_and_configure_leave_it_as_it_is(mine: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = tree(mine)
    loaded = small_run(tmp_path / "run", {"instance_data_dir": str(mine), "crop": True, **SHUFFLED}, max_train_steps=3)
    config = str(tmp_path / "run" / "config.json")
    for words in ([], ["--images"], ["--left-out"], ["--json"]):
        assert exit_code(["check", "--config", config, *words]) == 0
    assert tree(mine) == before, "after the checks"
    run(loaded)
    assert [line["step"] for line in metrics_of(output_of(loaded))] == [1, 2, 3]
    assert tree(mine) == before, "after a run"
    (ledger,) = json.loads((output_of(loaded) / "ledger.json").read_text())["datasets"]
    assert {key for key, _ in ledger["left_out"]} == {"empty.jpg", "torn.jpg"} and ledger["trained"] == 7
    flags = ["--model", "nano", "--images", str(mine), "--resolution", "32", "--steps", "3", "--captions", "textfile"]
    assert exit_code(["configure", "--yes", *flags, "--config", "made/config.json"]) == 0
    capsys.readouterr()
    assert tree(mine) == before, "after configure"


def test_a_strict_run_ends_before_training_and_lists_what_is_torn(mine: Path, tmp_path: Path):
    """The empty file shows at once; the torn one, whose header is whole, when it is encoded."""
    entry = {"instance_data_dir": str(mine)}
    with pytest.raises(UserError, match=r"strict is on, and 1 picture would be left out: empty\.jpg: is an empty file"):
        run(small_run(tmp_path / "one", entry, strict=True))
    entry |= {"instance_data_dir": str(copy_without(mine, tmp_path / "copy", "empty.jpg"))}
    loaded = small_run(tmp_path / "two", entry, strict=True)
    with pytest.raises(UserError, match=r"strict is on, and 1 picture would be left out: torn\.jpg: is damaged"):
        run(loaded)
    output = output_of(loaded)
    assert not (output / "metrics.jsonl").exists() or metrics_of(output) == []
    (ledger,) = json.loads((output / "ledger.json").read_text())["datasets"]
    assert [key for key, _ in ledger["left_out"]] == ["torn.jpg"]


def copy_without(folder: Path, target: Path, name: str) -> Path:
    """The visible files of the folder itself, but one."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != name and not path.name.startswith("."):
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_what_was_written_is_elsewhere(mine: Path, tmp_path: Path):
    """Nothing of a run stands outside its own folder, not even beside the pictures or in the working directory."""
    before = set(os.listdir(tmp_path))
    loaded = small_run(tmp_path / "run", {"instance_data_dir": str(mine)}, max_train_steps=1)
    run(loaded)
    assert set(os.listdir(tmp_path)) == before | {"run"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "multidatabackend.json", "output"}
