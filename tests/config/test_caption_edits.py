from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.config.caption_edits import (
    CaptionShuffle,
    filtered,
    parse_caption_filters,
    parse_caption_shuffle,
)
from sana_tune.config.load import load
from sana_tune.errors import UserError
from tests.config.helpers import write_files

# ---- shuffles ----


def test_a_shuffle_is_read_with_its_defaults():
    assert parse_caption_shuffle({"enable": True}) == CaptionShuffle()
    given = {"enable": "true", "count": "3", "seed": 7, "split_on": "space", "position_start": 2.0,
             "include_original": False}  # fmt: skip
    assert parse_caption_shuffle(given) == CaptionShuffle(3, 7, "space", 2, False)
    assert parse_caption_shuffle({"enable": True, "seed": None}) == CaptionShuffle()


@pytest.mark.parametrize("value", [None, "", {}, {"enable": False}, {"enable": "false", "count": 4}])
def test_a_shuffle_that_is_off_is_none(value):
    assert parse_caption_shuffle(value) is None


@pytest.mark.parametrize(
    "value, told",
    [
        (["comma"], "is an object such as"),
        ({"count": 3}, "enable is not there"),
        ({"enable": True, "counts": 3}, "found 'counts'"),
        ({"enable": "perhaps"}, "enable must be true or false; found 'perhaps'"),
        ({"enable": True, "count": 0}, "count must be a whole number from 1 to 1000; found 0"),
        ({"enable": True, "count": True}, "count must be a whole number"),
        ({"enable": True, "count": 1.5}, "count must be a whole number"),
        ({"enable": True, "seed": -1}, "seed must be a whole number from 0"),
        ({"enable": True, "split_on": ";"}, "split_on must be comma or space or period; found ';'"),
        ({"enable": True, "include_original": 3}, "include_original must be true or false; found 3"),
    ],
)
def test_a_wrong_shuffle_is_told(value, told: str):
    with pytest.raises(ValueError) as error:
        parse_caption_shuffle(value)
    assert told in str(error.value)


# ---- filters ----


@pytest.mark.parametrize(
    "text, filters, after",
    [
        ("a photo of a cat", ["a photo of "], "a cat"),
        ("a cat, a cat", ["cat"], "a , a "),
        ("1.5 (x)", [".5 (x)"], "1"),  # other text is taken letter for letter
        ("a cat", ["Cat"], "a cat"),
        ("a cat", ["s/CAT/dog/i"], "a dog"),
        ("a cat and cats", [r"s/\bcats?\b/dog/g"], "a dog and dog"),
        ("image 12 of 30", [r"s/(\d+) of (\d+)/\2-\1/"], "image 30-12"),
        ("a/b", [r"s/a\/b/c\/d/"], "c/d"),
        ("one watermark two", ["watermark"], "one two"),
        ("abc", ["s/a/b/", "s/b/c/"], "ccc"),
        ("two  blanks", ["never there"], "two  blanks"),
        ("line\nnext", [r"s/\n/, /"], "line, next"),
        ("sly/fox", ["sly/fox"], ""),
    ],
)
def test_filters_replace_and_remove(text: str, filters: list[str], after: str):
    assert filtered(text, parse_caption_filters(filters)) == after


def test_filters_are_read_from_files(tmp_path: Path):
    lines = ["watermark", "", r"s/a\b/b/", "  "]
    (tmp_path / "filters.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "filters.json").write_text(json.dumps(lines), encoding="utf-8")
    for name in ("filters.txt", "filters.json"):
        assert parse_caption_filters(str(tmp_path / name)) == ("watermark", r"s/a\b/b/")
    assert parse_caption_filters(None) == parse_caption_filters("") == parse_caption_filters([]) == ()


@pytest.mark.parametrize(
    "line, reason",
    [
        ("s/(a/b/", "is no regular expression: missing ), unterminated subpattern"),
        (r"s/a/\3/", "is no regular expression: invalid group reference 3"),
        (r"s/a/\g<x>/", "is no regular expression: unknown group name"),
        ("s/a/b", "a replacement is written s/pattern/replacement/"),
        ("s/a/b/c/", "a replacement is written s/pattern/replacement/"),
        ("s//b/", "the pattern is empty"),
        ("s/a/b/x", "behind the last slash stand g and i at most"),
        (7, "a filter is a text; found 7"),
    ],
)
def test_a_wrong_filter_is_told_with_its_line(line, reason: str, tmp_path: Path):
    with pytest.raises(ValueError) as error:
        parse_caption_filters(["right", line])
    assert str(error.value).startswith(f"entry 2: {reason}")
    if isinstance(line, str):
        (tmp_path / "f.txt").write_text(f"right\n\n{line}\ns/(/x/\n")
        with pytest.raises(ValueError) as error:
            parse_caption_filters(str(tmp_path / "f.txt"))
        assert f"f.txt, line 3: {reason}" in str(error.value) and "f.txt, line 4: is no regular" in str(error.value)


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("none.txt", None, "the file of filters cannot be read"),
        ("latin.txt", b"\xfcber", "the file of filters cannot be read"),
        ("broken.json", b"[", "the file of filters cannot be read"),
        ("object.json", b"{}", "must hold a JSON list"),
        ("filters.csv", b"a", "must be a list of filters, or the path of a .txt or .json file"),
    ],
)
def test_a_file_of_filters_that_is_none_is_told(name: str, content: bytes | None, told: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="filters") as error:
        parse_caption_filters(str(tmp_path / name))
    assert told in str(error.value)
    with pytest.raises(ValueError, match="must be a list of filters"):
        parse_caption_filters(3)


def test_a_wrong_filter_is_a_problem_of_its_entry_beside_all_others(tmp_path: Path):
    path = write_files(tmp_path, {"learning_rate": -1}, {"caption_shuffle": {"enable": True, "split_on": "tab"}})
    datasets = tmp_path / "multidatabackend.json"
    entries = json.loads(datasets.read_text())
    entries.append({"id": "texts", "dataset_type": "text_embeds", "caption_filter_list": ["fine", "s/[/x/"]})
    datasets.write_text(json.dumps(entries))
    with pytest.raises(UserError) as error:
        load(path, {}, {})
    told = {problem.where.split(": ", 1)[-1]: problem.what for problem in error.value.problems}
    assert len(told) == 3
    assert told["texts: caption_filter_list"].startswith("entry 2: is no regular expression")
    assert any(what.startswith("split_on must be") for what in told.values())
