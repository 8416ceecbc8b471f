"""Single values: resolutions, names with a guess, the instruction."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.values import Resolution, named, nearest, parse_instruction, parse_resolutions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", [(1024, 1024)]),
        (512, [(512, 512)]),
        ("1024x768, 512", [(1024, 768), (512, 512)]),
        (["64", "96X64"], [(64, 64), (96, 64)]),
        ("", []),
        (None, []),
    ],
)
def test_resolutions(text: object, expected: list) -> None:
    assert list(parse_resolutions(text)) == [Resolution(*size) for size in expected]


@pytest.mark.parametrize("text", ["0", "12x", "a", "64x0", "-64", "1.5"])
def test_bad_resolutions(text: str) -> None:
    with pytest.raises(ValueError, match="N or WxH"):
        parse_resolutions(text)


def test_nearest_name() -> None:
    assert nearest("adamv", ["adamw", "lion"]) == "adamw"
    assert nearest("zzz", ["adamw", "lion"]) is None
    with pytest.raises(ValueError, match="did you mean 'lion'"):
        named({"lion": "", "adamw": ""}, "optimizer")("lionn")


def test_instruction_in_all_its_forms(tmp_path: Path) -> None:
    assert parse_instruction(["a", "b "]) == "a\nb "
    assert parse_instruction('["a", "b"]') == "a\nb"
    assert parse_instruction("None") == "None"
    path = tmp_path / "instruction.txt"
    path.write_text("from a file ")
    assert parse_instruction(str(path)) == "from a file "
    with pytest.raises(ValueError, match="does not exist"):
        parse_instruction("missing.txt")
