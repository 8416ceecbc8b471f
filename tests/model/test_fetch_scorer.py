"""Finding CLIP: in a folder, in the cache, on a hub of our own with the real client; what is told when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_tune.errors import UserError
from sana_tune.model.fetch_scorer import KEY, locate_scorer, needed
from tests.fake_hub import FakeHub

NAME = "someone/tiny-clip"
CALL = """
import sys
from sana_tune.errors import UserError
from sana_tune.model.fetch_scorer import locate_scorer
try:
    print(locate_scorer(sys.argv[1]))
except UserError as error:
    print("problem:", error)
assert "torch" not in sys.modules
"""
FILES = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Files as the hub has them: PyTorch's and TensorFlow's weights, and no safetensors."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (folder / name).write_bytes(name.encode() * 10)
    return folder


def asked(name: str, home: Path, url: str, *, offline: bool = False) -> str:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    ran = subprocess.run([sys.executable, "-c", CALL, name], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_what_is_needed_is_one_kind_of_weights():
    assert needed([*FILES, "pytorch_model.bin", "tf_model.h5"]) == sorted([*FILES, "pytorch_model.bin"])
    both = needed([*FILES, "pytorch_model.bin", "model.safetensors"])
    assert "model.safetensors" in both and "pytorch_model.bin" not in both
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert set(parts) < set(needed([*FILES, "model.safetensors.index.json", *parts]))


def test_a_folder_is_looked_into(repository: Path):
    assert locate_scorer(str(repository)) == repository.resolve()
    (repository / "pytorch_model.bin").unlink()
    (repository / "merges.txt").unlink()
    with pytest.raises(UserError) as caught:
        locate_scorer(str(repository))
    (problem,) = caught.value.problems
    assert problem.where == KEY
    assert "lacks tokenizer.json or vocab.json and merges.txt, model.safetensors or" in problem.what


@pytest.mark.parametrize("name", ["nano", "no/such/folder", "https://x"])
def test_what_is_no_name_is_told_under_its_key(name: str):
    with pytest.raises(UserError) as caught:
        locate_scorer(name)
    assert [problem.where for problem in caught.value.problems] == [KEY]


def test_offline_without_it_the_run_does_not_start():
    with pytest.raises(UserError, match="offline mode is on"):
        locate_scorer(NAME)


def test_it_is_downloaded_once_and_found_again_without_the_hub(repository: Path, tmp_path: Path):
    home = tmp_path / "home"
    with FakeHub({NAME: repository}) as hub:
        folder = Path(asked(NAME, home, hub.url))
        assert {path.name for path in folder.iterdir()} == {*FILES, "pytorch_model.bin"}
        assert "tf_model.h5" not in hub.downloaded()
        first = len(hub.requests)
        assert asked(NAME, home, hub.url) == str(folder) and len(hub.requests) == first
        assert "problem: " in (unknown := asked("someone/else", home, hub.url)) and KEY in unknown
    assert asked(NAME, home, hub.url, offline=True) == str(folder)
    (repository / "config.json").write_text(json.dumps({}))


def test_what_is_no_clip_model_is_not_downloaded(repository: Path, tmp_path: Path):
    (repository / "preprocessor_config.json").unlink()
    with FakeHub({NAME: repository}) as hub:
        told = asked(NAME, tmp_path / "home", hub.url)
        assert "lacks preprocessor_config.json" in told and not hub.downloaded()
