"""Packaged examples: listed, and copied so that the copy stands on its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.cli.examples import copy_example
from sana_tune.cli.main import exit_code
from sana_tune.config.describe import schema_path
from sana_tune.config.files import examples_dir, list_examples
from sana_tune.config.load import load
from sana_tune.errors import UserError
from sana_tune.prompts import prompts_of

PACKAGED = "config/examples/nano"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_they_are_listed_with_what_they_are(capsys):
    assert exit_code(["examples", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_examples()) and len(lines) == 11
    for line in lines:
        name, title = line.split(maxsplit=1)
        assert title.startswith(f"{name}: ") and len(title) > len(name) + 20


@pytest.mark.parametrize("dest", ["mine", "a/b", "with blank", "ABSOLUTE"])
def test_a_copy_uses_its_own_files(dest, tmp_path, capsys):
    dest = str(tmp_path / "absolute") if dest == "ABSOLUTE" else dest
    assert exit_code(["examples", "copy", "nano", "--dest", dest]) == 0
    assert f"copied to {dest}" in capsys.readouterr().out
    copied, packaged = Path(dest), examples_dir() / "nano"
    names = {path.relative_to(packaged) for path in packaged.rglob("*") if path.is_file()}
    assert len(names) >= 50 and names == {path.relative_to(copied) for path in copied.rglob("*") if path.is_file()}
    for path in copied.rglob("*.json"):
        assert PACKAGED not in path.read_text(encoding="utf-8")
    loaded = load(copied / "config.json", {}, {})
    assert {dataset.instance_data_dir for dataset in loaded.datasets} == {f"{dest}/pictures", f"{dest}/known"}
    assert loaded.config.train.output_dir == f"output/{copied.name}", "a copy must not go on from the example's run"
    library = loaded.config.validation.user_prompt_library
    assert library and Path(library).parent == copied and prompts_of(loaded.config.validation, str.strip)


def test_the_schema_of_a_copy_is_the_installed_one(tmp_path):
    assert copy_example("sana-1.6b-24gb", Path("mine")) == Path("mine")
    for file, name in (("config.json", "config"), ("multidatabackend.json", "multidatabackend")):
        assert json.loads(Path("mine", file).read_text())["$schema"] == str(schema_path(name))
    library = json.loads(Path("mine/user_prompt_library.json").read_text())
    assert "$schema" not in library, "every key there is a nickname"


def test_without_dest_it_is_where_a_checkout_has_it():
    """From there its own paths are right as they are, and win over the packaged ones."""
    assert copy_example("nano", None) == Path(PACKAGED)
    assert json.loads(Path(PACKAGED, "config.json").read_text())["data_backend_config"].startswith(PACKAGED)
    assert load(Path(PACKAGED, "config.json"), {}, {}).datasets[0].instance_data_dir == f"{PACKAGED}/pictures"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    (tmp_path / "file").touch()
    for dest in ("full", "file"):
        with pytest.raises(UserError, match="must be new or empty"):
            copy_example("nano", Path(dest))
    assert (tmp_path / "full" / "config.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert copy_example("nano", Path("empty")) == Path("empty")


def test_what_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no example 'nan'; known: nano"):
        copy_example("nan", None)
    with pytest.raises(UserError, match="cannot be written"):
        copy_example("nano", Path("file/below"))
