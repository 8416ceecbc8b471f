"""Tables of captions and addresses. No torch.

.csv, .tsv, .jsonl and .json are read by the standard library, .parquet by pyarrow.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import basename, splitext
from typing import Any

from sana_tune.config.files import resolve
from sana_tune.config.sources import CaptionTable
from sana_tune.config.values import nearest
from sana_tune.data.geometry import Size
from sana_tune.errors import Problem, UserError

# Columns that name pictures, where nobody says which.
FILENAME_COLUMN = "filename"
CAPTION_COLUMN = "caption"
_LONGEST_FIELD = 1 << 24  # characters of one field of a .csv file


@dataclass(frozen=True)
class TableCaptions:
    """The captions of pictures as a table has them.

    table: its name, for messages. texts: picture's key → its variants, none when its row has none.
    sizes: picture's key → its size, where the table tells it. orphans: what rows without a picture name.
    """

    table: str
    texts: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    orphans: tuple[str, ...] = ()


def read_table(path: str | Path, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """The values of these columns, row by row. UserError for a table that cannot be read or lacks a column."""
    place = resolve(path)
    reader = _READERS.get(place.suffix.lower())
    if reader is None:
        what = f"a table is one of {', '.join(_READERS)}; found {place.suffix or 'no ending'}"
        raise UserError(Problem(str(path), what, "save it as one of these"))
    if not place.is_file():
        looked = "" if place.is_absolute() else f" (looked in {Path.cwd()})"
        raise UserError(Problem(str(path), f"the table must exist and does not{looked}", "check the path"))
    try:
        return list(reader(place, columns))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(Problem(str(path), f"the table cannot be read: {reason}", "is it whole?")) from error
    except UnicodeDecodeError as error:
        what = f"the table must be UTF-8 text; found other bytes at {error.start}"
        raise UserError(Problem(str(path), what, "save it again as UTF-8")) from error


def captions_of_table(
    table: CaptionTable,
    keys: Sequence[str],
    *,
    caption_column: str | None = None,
    filename_column: str | None = None,
    captions: bool = True,
) -> TableCaptions:
    """The captions of the pictures `keys`. caption_column, filename_column: where the block names none.

    captions: False for sizes alone.

    A row belongs to the picture of the same path below the folder, with or without its ending; a name without a
    folder belongs to the picture of that name wherever it is, if there is one only. Several rows of a picture add up.
    """
    names = table.filename_column or filename_column or FILENAME_COLUMN
    columns = table.caption_columns or (caption_column or CAPTION_COLUMN,) if captions else ()
    extra = [table.fallback_caption_column] if table.fallback_caption_column and captions else []
    sizes = [table.width_column, table.height_column] if table.width_column and table.height_column else []
    rows = read_table(table.path, [names, *columns, *extra, *sizes])
    match = _matcher(keys, with_ending=table.identifier_includes_extension)
    texts: dict[str, tuple[str, ...]] = {}
    known: dict[str, Size] = {}
    orphans: list[str] = []
    for name, *values in rows:
        key = match(str(name)) if name is not None else None
        if key is None:
            orphans.append(str(name))
            continue
        found = tuple(text for value in values[: len(columns)] for text in texts_of(value))
        fallback = texts_of(values[len(columns)]) if extra and not found else ()
        texts[key] = tuple(dict.fromkeys((*texts.get(key, ()), *found, *fallback)))
        if sizes and (size := _size(*values[-2:])) is not None:
            known[key] = size
    return TableCaptions(basename(table.path), texts, known, tuple(orphans))


def texts_of(value: Any) -> tuple[str, ...]:
    """The captions in a field: a text, or each of a list of texts; empty ones are none."""
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if isinstance(value, (list, tuple)):
        return tuple(text for part in value for text in texts_of(part))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    return (str(value),)


def _matcher(keys: Sequence[str], *, with_ending: bool) -> Callable[[str], str | None]:
    """A function from what a row names to the picture's key."""
    whole = {key: key for key in keys}
    bare = _unique((splitext(key)[0], key) for key in keys)
    names = _unique((basename(key), key) for key in keys)
    bare_names = _unique((splitext(basename(key))[0], key) for key in keys)
    order = (whole, names) if with_ending else (whole, bare, names, bare_names)

    def match(name: str) -> str | None:
        path = name.strip().replace("\\", "/").removeprefix("./")
        return next((key for table in order if (key := table.get(path)) is not None), None)

    return match


def _unique(pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    """A mapping without the names that stand for several keys."""
    found: dict[str, str] = {}
    several: set[str] = set()
    for name, key in pairs:
        if name in found:
            several.add(name)
        found[name] = key
    return {name: key for name, key in found.items() if name not in several}


def _size(width: Any, height: Any) -> Size | None:
    try:
        size = Size(int(width), int(height))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


# ---- formats ----


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_columns(path, columns, header)
            places = [header.index(column) for column in columns]
            for row in reader:
                if row:  # an empty line is none
                    yield tuple(row[place] if place < len(row) else None for place in places)
        except csv.Error as error:
            what = f"line {reader.line_num} is no line of such a table: {error}"
            raise UserError(Problem(str(path), what, "mend it, or save the table again")) from error


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with open(path, encoding="utf-8-sig") as file:
        yield from _of_objects(path, columns, _objects(path, file))


def _objects(path: Path, lines: Iterator[str] | Any) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                what = f"line {number} is no JSON: {error}"
                raise UserError(Problem(str(path), what, "each line holds one object, {…}")) from error


def _read_json(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):  # one object a line, under the other ending
            yield from _of_objects(path, columns, _objects(path, text.splitlines()))
            return
        raise UserError(Problem(str(path), f"is no JSON: {error}", "it is a list of objects: [ {…}, {…} ]")) from error
    if not isinstance(content, list):
        raise UserError(Problem(str(path), "must be a list of objects", "write [ {…}, {…} ]"))
    yield from _of_objects(path, columns, iter(content))


def _of_objects(path: Path, columns: Sequence[str], objects: Iterator[Any]) -> Iterator[tuple[Any, ...]]:
    """The rows of objects. A column must be in one of them; where it is not, there is no value."""
    seen: set[str] = set()
    rows: list[tuple[Any, ...]] = []
    for number, row in enumerate(objects, start=1):
        if not isinstance(row, Mapping):
            what = f"entry {number} must be an object, {{…}}; found {type(row).__name__}"
            raise UserError(Problem(str(path), what, "each row is an object of columns"))
        seen.update(map(str, row))
        rows.append(tuple(row.get(column) for column in columns))
    if rows:
        _check_columns(path, columns, sorted(seen))
    yield from rows


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        what = f"a .parquet table needs pyarrow, which cannot be imported ({error})"
        fix = "install it: pip install '.[datasets]'; or save the table as .jsonl or .csv"
        raise UserError(Problem(str(path), what, fix)) from None
    try:
        with ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                values = [batch.column(column).to_pylist() for column in columns]
                yield from zip(*values, strict=True)
    except ArrowException as error:
        raise UserError(Problem(str(path), f"is no table of parquet: {error}", "is it whole?")) from error


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[tuple[Any, ...]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _check_columns(path: Path, columns: Sequence[str], there: Sequence[str]) -> None:
    """UserError with every column that is not there."""
    problems = []
    for column in dict.fromkeys(columns):
        if column not in there:
            guess = nearest(column, there)
            hint = f"did you mean {guess}? " if guess else ""
            what = f"the table has no column {column}; it has {', '.join(there) or 'none'}"
            problems.append(Problem(str(path), what, f"{hint}Name the right one in the dataset's settings"))
    if problems:
        raise UserError(*problems)
