"""Settings files in three formats: what they mean, and every break with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.formats import LARGEST_BYTES, read
from sana_tune.errors import UserError

# A list of a list of a list …, ten times each: small as a file, 10^12 values when written out.
LAUGHS = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 13)
)

BROKEN = [
    ("json", b'{"a": 1, // why\n "b": 2}', "JSON has no comments"),
    ("json", b'{\n  # why\n  "a": 1}', "JSON has no comments"),
    ("json", b'{"a": 1, # why\n "b": 2}', "JSON has no comments"),
    ("json", b'{"a": 1 /* why */}', "JSON has no comments"),
    ("json", b'{"a": 1,\n}', "remove the comma"),
    ("json", b'{"a": 1, "a": 2}', "a: the key stands twice"),
    ("json", b'{"a": {"b": 1, "b": 2}}', "b: the key stands twice"),
    ("json", b'{"a": ', "must be JSON"),
    ("json", b"{'a': 1}", "double quotes"),
    ("json", b'{"a": True}', "true, false and null"),
    ("json", b'{"a": "C:\\pictures"}', "C:/pictures"),
    ("json", b"", "must be JSON"),
    ("json", b'{"a": "\xff"}', "UTF-8"),
    ("json", '{"a": 1}'.encode("utf-16"), "UTF-8"),
    ("json", b"[" * 100_000, "nested too deeply"),
    ("json", b'{"a": ' + b"9" * 5000 + b"}", "must be JSON: Exceeds the limit"),
    ("toml", b"a = 1\na = 2", "the key stands twice"),
    ("toml", b"a = b", "line 1: the file must be TOML: invalid value"),
    ("toml", b"# fine\na", "must be TOML"),
    ("toml", b"a = " + b"[" * 100_000, "nested too deeply"),
    ("toml", b"a = " + b"9" * 5000, "must be TOML: Exceeds the limit"),
    ("yaml", b"a: 1\nb: 2\na: 3", "line 3: a: the key stands twice"),
    ("yaml", b"a: {b: 1, b: 2}", "b: the key stands twice"),
    ("yaml", b"a: [1", "line 2: the file must be YAML"),
    ("yaml", b"a: 1\n\tb: 2", "not tabs"),
    ("yaml", b"a: b: c", "quote text with ': '"),
    ("yaml", b"a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    ("yaml", b"--- 1\n--- 2", "another document"),
    ("yaml", b"a: \x01", "plain UTF-8 text"),
    ("yaml", b"a: " + b"[" * 100_000, "nested too deeply"),
    ("yaml", b"- " * 100_000, "nested too deeply"),
    ("yaml", b"a: &a [*a]", "nested too deeply"),
    ("yaml", LAUGHS, "nested too deeply"),
    ("yaml", b"? [1]\n: 2", "must be YAML"),
]


@pytest.mark.parametrize(("ending", "content", "expected"), BROKEN)
def test_a_break_is_told_with_its_place(ending: str, content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / f"config.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as told:
        read(path, "config")
    assert str(path) in str(told.value) and len(str(told.value)) < 500


def test_yaml_is_read_as_its_version_1_2(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "rate: 1e-5\nprecision: no\nyes: on\nday: 2026-01-01\ntime: 1:30\nzeros: 010\nhex: 0x10\nnone: ~\nempty:\n"
        "list: [1, 2.5, true, False]\n<<: merged\nnegative: -1e5\nquoted: '5'\n"
    )
    assert read(path, "config") == {
        "rate": 1e-5, "precision": "no", "yes": "on", "day": "2026-01-01", "time": "1:30", "zeros": 10, "hex": 16,
        "none": None, "empty": None, "list": [1, 2.5, True, False], "<<": "merged", "negative": -1e5, "quoted": "5",
    }  # fmt: skip


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    for ending, text in (("json", '{"a": 1}'), ("toml", "a = 1"), ("yaml", "a: 1")):
        path = tmp_path / f"config.{ending}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(path, "config") == {"a": 1}


def test_an_unknown_ending_is_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json.example"
    path.write_text('{"a": 1}')
    assert read(path, "config") == {"a": 1}


def test_a_large_file_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"a" * (LARGEST_BYTES + 1))
    with pytest.raises(UserError, match=r"is 0\.5 MB large"):
        read(path, "config")


@pytest.mark.parametrize("name", ["none.json", ".", "\0", "a" * 300])
def test_a_path_that_is_no_file_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the config (must exist|cannot be read)"):
        read(tmp_path / name, "config")
