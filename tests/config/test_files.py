"""Finding config.json, reading strict JSON, packaged examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.files import examples_dir, find_config, list_examples, read_json, resolve
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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1, // why\n "b": 2}', "JSON has no comments"),
        (b'{\n  # why\n  "a": 1}', "JSON has no comments"),
        (b'{"a": 1, # why\n "b": 2}', "JSON has no comments"),
        (b'{"a": 1 /* why */}', "JSON has no comments"),
        (b'{"a": 1,\n}', "remove the comma"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": ', "must be JSON"),
        (b"", "must be JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_json_is_told_with_its_place(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as told:
        read_json(path, "config")
    assert str(path) in str(told.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, "config") == {"a": 1}


def test_packaged_examples_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nano" in list_examples()
    assert resolve("config/examples/nano/config.json") == examples_dir() / "nano" / "config.json"
    own = _touch(tmp_path / "config" / "examples" / "nano" / "config.json")
    assert resolve("config/examples/nano/config.json").resolve() == own.resolve(), "a local copy wins"
