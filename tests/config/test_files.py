"""Finding the config by flags, environment and place; config.env; packaged examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.files import examples_dir, find_config, list_examples, read_environment_files, resolve
from sana_tune.errors import UserError


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_the_places_are_searched_in_order(tmp_path: Path) -> None:
    second = _touch(tmp_path / "config" / "config.json")
    assert find_config(None, None, None, {}, tmp_path)[0] == second
    first = _touch(tmp_path / "config.json")
    assert find_config(None, None, None, {}, tmp_path)[0] == first
    named = _touch(tmp_path / "config" / "mine" / "config.json")
    assert find_config(None, "mine", None, {}, tmp_path)[0] == named
    assert find_config(None, None, None, {"ENV": "mine"}, tmp_path)[0] == named
    assert find_config(None, None, None, {"CONFIG_PATH": str(named.parent)}, tmp_path)[0] == named
    assert find_config(str(first), "mine", None, {"CONFIG_PATH": str(named)}, tmp_path)[0] == first


def test_a_containers_ENV_only_gives_a_note(tmp_path: Path) -> None:
    path = _touch(tmp_path / "config.json")
    found, notes = find_config(None, None, None, {"ENV": "/etc/shinit_v2"}, tmp_path)
    assert found == path and "passed over" in notes[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None, None), "no config file was found"),
        (("missing.json", None, None), "must exist"),
        ((None, "missing", None), "config/missing/config.json must exist"),
        ((None, None, "missing"), "no example 'missing'; known: "),
    ],
)
def test_what_is_not_there_is_told(arguments: tuple, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        find_config(*arguments, {}, tmp_path)


def test_any_format_is_found_and_json_first(tmp_path: Path) -> None:
    env = _touch(tmp_path / "config" / "config.env")
    assert find_config(None, None, None, {}, tmp_path)[0] == env
    yaml = _touch(tmp_path / "config" / "config.yaml")
    toml = _touch(tmp_path / "config" / "config.toml")
    assert find_config(None, None, None, {}, tmp_path)[0] == toml
    first = _touch(tmp_path / "config" / "config.json")
    assert find_config(None, None, None, {}, tmp_path)[0] == first
    assert find_config(None, None, None, {"CONFIG_BACKEND": "yaml"}, tmp_path)[0] == yaml
    assert find_config(None, None, None, {"SIMPLETUNER_CONFIG_BACKEND": "env"}, tmp_path)[0] == env
    assert find_config(str(tmp_path / "config"), None, None, {}, tmp_path)[0] == first
    assert find_config(str(tmp_path / "config" / "config"), None, None, {}, tmp_path)[0] == first, "the ending is added"


def test_the_flags_alone_can_be_asked_for(tmp_path: Path) -> None:
    assert find_config(None, None, None, {"CONFIG_BACKEND": "cmd"}, tmp_path)[0] is None
    with pytest.raises(UserError, match="must be one of json, toml, yaml, env, cmd; found 'xml'"):
        find_config(None, None, None, {"CONFIG_TYPE": "xml"}, tmp_path)


def test_an_environment_can_be_a_path_and_outranks_another(tmp_path: Path) -> None:
    folder, one = _touch(tmp_path / "runs" / "a" / "config.toml"), _touch(tmp_path / "config" / "one" / "config.json")
    assert find_config(None, "runs/a", None, {}, tmp_path)[0] == folder
    assert find_config(None, "runs/a/config.toml", None, {}, tmp_path)[0] == folder
    both = {"SIMPLETUNER_ENVIRONMENT": "one", "ENV": "runs/a"}
    assert find_config(None, None, None, both, tmp_path)[0] == one
    with pytest.raises(UserError, match=r"SIMPLETUNER_ENV: config/none/config.json must exist and does not; there"):
        find_config(None, None, None, {"SIMPLETUNER_ENV": "none"}, tmp_path)


def test_config_env_joins_the_environment_the_named_one_last(tmp_path: Path) -> None:
    for name, text in (("config.env", "A=1\nB=1\n"), ("mine/config.env", "B=${A}2\n")):
        _touch(tmp_path / "config" / name).write_text(text)
    assert read_environment_files(None, {}, tmp_path) == {"A": "1", "B": "1"}
    assert read_environment_files("mine", {}, tmp_path) == {"A": "1", "B": "12"}
    assert read_environment_files(None, {"ENV": "mine"}, tmp_path)["B"] == "12"
    (tmp_path / "config" / "config.env").write_text("A=3\nENV=mine\n")
    assert read_environment_files(None, {}, tmp_path) == {"A": "3", "ENV": "mine", "B": "32"}


def test_packaged_examples_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nano" in list_examples()
    assert resolve("config/examples/nano/config.json") == examples_dir() / "nano" / "config.json"
    own = _touch(tmp_path / "config" / "examples" / "nano" / "config.json")
    assert resolve("config/examples/nano/config.json").resolve() == own.resolve(), "a local copy wins"
