"""Single values: resolutions, names with a guess, the instruction."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.values import (
    AspectBucket,
    Resolution,
    disk_bytes,
    named,
    nearest,
    parse_aspect_buckets,
    parse_disk_size,
    parse_instruction,
    parse_levels,
    parse_resolutions,
)


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


def test_aspect_buckets() -> None:
    assert parse_aspect_buckets([0.75, "1", {"aspect": 1.5, "weight": 2}, {"aspect": "2.0"}]) == (
        AspectBucket(0.75, 1.0),
        AspectBucket(1.0, 1.0),
        AspectBucket(1.5, 2.0),
        AspectBucket(2.0, 1.0),
    )
    assert parse_aspect_buckets(None) == parse_aspect_buckets([]) == parse_aspect_buckets("") == ()
    once = parse_aspect_buckets([1, 0.5])
    assert parse_aspect_buckets(once) == once
    assert parse_aspect_buckets([bucket._asdict() for bucket in once]) == once


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, "must be a list of aspect ratios, such as [0.75, 1.0, 1.5]; found 1.5"),
        ("0.75,1.0", "must be a list of aspect ratios"),
        ({"aspect": 1}, "must be a list of aspect ratios"),
        ([1024], "an aspect ratio is width / height, a number from 0.05 to 20; found 1024"),
        ([0], "from 0.05 to 20; found 0"),
        ([-1.0], "from 0.05 to 20; found -1.0"),
        ([float("nan")], "from 0.05 to 20; found nan"),
        ([True], "from 0.05 to 20; found True"),
        ([None], "from 0.05 to 20; found None"),
        ([[1.0, 0.5]], "from 0.05 to 20; found [1.0, 0.5]"),
        (["16:9"], "found '16:9' (write 1.778)"),
        (["16:0"], "found '16:0'"),
        ([10**400], "from 0.05 to 20"),
        ([1, "1.0"], "every aspect ratio must stand there once; 1 stands there 2 times"),
        (
            [{"aspect_ratio": 1.5}],
            'an entry is a number or {"aspect": 1.5, "weight": 2}; found {\'aspect_ratio\': 1.5}',
        ),
        ([{"weight": 1}], "an entry is a number or"),
        ([{"aspect": 1.5, "weight": 0}], "a weight must be a number greater than 0; found 0"),
        ([{"aspect": 1.5, "weight": "much"}], "a weight must be a number greater than 0; found 'much'"),
        ([{"aspect": 1.5, "weight": float("inf")}], "a weight must be a number greater than 0; found inf"),
    ],
)
def test_bad_aspect_buckets(value: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_aspect_buckets(value)
    assert message in str(caught.value)


def test_a_refused_name_says_what_to_use() -> None:
    check = named({"cosine": ""}, "schedule", {"sine": "it never ends; use cosine"})
    assert check("cosine") == "cosine"
    with pytest.raises(ValueError, match="the schedule 'sine' cannot be used: it never ends; use cosine"):
        check("sine")


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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.25,0.5,1", (0.25, 0.5, 1.0)),
        ("1000, 250,500", (0.25, 0.5, 1.0)),
        ([1, 2, 2], (0.001, 0.002, 0.002)),
        ([0.5, "0.25"], (0.25, 0.5)),
        (0.5, (0.5,)),
        (750, (0.75,)),
        ("", None), ([], None), (None, None),
    ],
)  # fmt: skip
def test_noise_levels_and_timesteps(value, expected):
    assert parse_levels(value) == expected
    assert parse_levels(parse_levels(value)) == expected, "what a run writes down reads the same"


@pytest.mark.parametrize("value", ["0.5,", "a", "0,1", "1001", [-0.5], [[1]], {"a": 1}, True, "nan", 10**400])
def test_what_are_no_noise_levels(value):
    with pytest.raises(ValueError, match="noise levels are numbers above 0"):
        parse_levels(value)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        (1000, 1000), ("1000", 1000), ("20 GB", 20 * 10**9), ("500M", 500 * 10**6), ("1.5 TiB", round(1.5 * 2**40)),
        ("2k", 2000), ("2 KiB", 2048), ("5%", 50_000), ("0.5 %", 5_000), ("7 B", 7),
    ],
)  # fmt: skip
def test_sizes_of_the_disk(text, bytes_):
    assert disk_bytes(parse_disk_size(text), 10**6) == bytes_


@pytest.mark.parametrize("text", ["much", "-5", "5 PB", "100%", "250 %", "1e9", True, "5 % GB", 10**400])
def test_what_is_no_size_of_a_disk(text):
    with pytest.raises(ValueError, match=r"20 GB|below 100%"):
        parse_disk_size(text)


def test_no_size_is_none():
    assert [parse_disk_size(each) for each in (None, "", "none", "None")] == [None] * 4


def test_a_colour_that_was_drawn_with_before_keeps_its_name():
    from PIL.ImageColor import getrgb

    from sana_tune.config.values import parse_colour

    getrgb("rebeccapurple")  # from here on Pillow's table holds numbers for it
    assert parse_colour("rebeccapurple") == "#663399"
