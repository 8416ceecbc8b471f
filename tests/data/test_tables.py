"""Tables of captions: every format says the same, rows find their pictures, and what is wrong is told."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.sources import CaptionTable
from sana_tune.data.geometry import Size
from sana_tune.data.tables import captions_of_table, read_table, texts_of
from sana_tune.errors import UserError

ROWS = [{"filename": "a.png", "caption": "Eins, „zwei“"}, {"filename": "sub/b.jpg", "caption": "two\nlines"}]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    ".csv": write_csv,
    ".tsv": write_csv,
    ".jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n\n" for row in rows)),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".parquet": write_parquet,
}


def written(folder: Path, rows: list[dict[str, Any]], ending: str = ".jsonl") -> str:
    path = folder / f"table{ending}"
    WRITERS[ending](path, rows)
    return str(path)


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_holds_the_same(tmp_path: Path, ending: str):
    path = written(tmp_path, ROWS, ending)
    assert read_table(path, ["caption", "filename"]) == [(row["caption"], row["filename"]) for row in ROWS]
    with pytest.raises(UserError) as error:
        read_table(path, ["captoin", "filename", "width"])
    first, second = error.value.problems
    assert "no column captoin; it has" in first.what and "did you mean caption?" in first.fix
    assert "no column width" in second.what


def test_one_object_a_line_may_stand_in_a_json_file(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert read_table(tmp_path / "x.json", ["a"]) == [(1,), (2,)]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.csv", None, "must exist and does not"),
        ("x.xlsx", b"", "a table is one of .csv, .tsv, .jsonl, .json, .parquet; found .xlsx"),
        ("x.csv", b"a,b\n\xff\xfe,1\n", "must be UTF-8 text"),
        ("x.csv", b"", "has no column a; it has none"),
        ("x.csv", b'a\n"x"y\n', "line 2 is no line of such a table"),
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is no JSON"),
        ("x.jsonl", b"[1]\n", "entry 1 must be an object"),
        ("x.json", b'"text"', "must be a list of objects"),
        ("x.json", b"nothing", "is no JSON"),
        ("x.parquet", b"PAR1 torn", "no table of parquet"),
    ],
)
def test_a_table_that_cannot_be_read_is_told(tmp_path: Path, name: str, content: bytes | None, words: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_table(tmp_path / name, ["a"])
    assert words in str(error.value) and name in str(error.value)


KEYS = ["a.png", "sub/b.jpg", "sub/c.png", "other/c.png", "x.tar.png"]


def test_rows_find_their_pictures(tmp_path: Path):
    names = {
        "a": "a.png", "sub/b": "sub/b.jpg", "b": "sub/b.jpg", ".\\sub\\c.png": "sub/c.png", "c": None, "c.png": None,
        "./other/c": "other/c.png", "x.tar": "x.tar.png", "nothing": None,
    }  # fmt: skip
    path = written(tmp_path, [{"filename": name, "caption": f"of {name}"} for name in names])
    found = captions_of_table(CaptionTable(path), KEYS)
    assert found.orphans == ("c", "c.png", "nothing") and found.table == "table.jsonl"
    expected: dict[str, tuple[str, ...]] = {}
    for name, key in names.items():
        if key is not None:
            expected[key] = (*expected.get(key, ()), f"of {name}")
    assert found.texts == expected, "several rows of one picture add up"
    whole = captions_of_table(CaptionTable(path, identifier_includes_extension=True), KEYS)
    assert whole.orphans == ("a", "sub/b", "b", "c", "c.png", "./other/c", "x.tar", "nothing")


def test_columns_by_name_by_default_and_from_the_config(tmp_path: Path):
    rows = [{"name": "a", "short": "s", "long": ["l1", " ", "l2"], "tags": "t", "w": "640", "h": 480.0}]
    rows.append({"name": "sub/b", "short": "", "long": None, "tags": "only tags", "w": "?", "h": 0})
    path = written(tmp_path, rows)
    table = CaptionTable(path, "name", ("short", "long"), "tags", "w", "h")
    found = captions_of_table(table, KEYS)
    assert found.texts == {"a.png": ("s", "l1", "l2"), "sub/b.jpg": ("only tags",)}
    assert found.sizes == {"a.png": Size(640, 480)}
    found = captions_of_table(CaptionTable(path), KEYS, caption_column="tags", filename_column="name")
    assert found.texts["a.png"] == ("t",) and not found.sizes
    with pytest.raises(UserError, match="no column filename"):
        captions_of_table(CaptionTable(path), KEYS)


def test_what_a_field_says():
    assert texts_of("a") == ("a",) and texts_of(["a", ["b", ""], None]) == ("a", "b")
    assert texts_of(None) == texts_of("  ") == texts_of(float("nan")) == ()
    assert texts_of(3) == ("3",)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from sana_tune.data.tables import read_table\n"
        "from sana_tune.errors import UserError\n"
        f"try: read_table({str(tmp_path / 'x.parquet')!r}, ['a'])\n"
        "except UserError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs pyarrow" in ran.stdout and "pip install '.[datasets]'" in ran.stdout, ran.stderr
