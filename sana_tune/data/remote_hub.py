"""Pictures in a dataset of the Hugging Face `datasets` library: in a folder on disk, or on the hub. No torch.

A folder is one that `save_to_disk` wrote, or one of picture or table files; the library downloads what is on the hub
once. Keys are the numbers of rows, from 0.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from sana_tune.config.files import resolve
from sana_tune.config.sources import HubOptions
from sana_tune.config.values import nearest
from sana_tune.data.records import digest
from sana_tune.data.tables import TableCaptions, texts_of
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.store import Entry, StoreLost

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves at the top of a folder
_KEY_DIGITS = 9


class HubStore:
    """The pictures of one split. name: hub id, or a folder. An entry's mtime_ns stands for the whole dataset's content.

    A row whose picture is a path is read from there; one without a picture cannot be read.
    """

    all_pictures = True
    far_away = False

    def __init__(
        self,
        name: str,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "caption",
        revision: str | None = None,
        options: HubOptions | None = None,
    ) -> None:
        self.name, self.split = name, split
        self._image, self._caption = image_column, caption_column
        self._revision, self._options = revision, options or HubOptions()
        self._lock = threading.Lock()
        self._whole: Any = None
        self._pictures: Any = None
        self._mark = 0

    def check(self) -> None:
        """UserError when the library is not installed, or a folder that is meant is not there. Nothing is loaded."""
        _library(self.name)
        place = resolve(self.name)
        meant = self.name.startswith(("/", "./", "../", "~")) or self.name.count("/") > 1
        if meant and not place.is_dir():
            what = "the folder of the dataset does not exist"
            raise UserError(Problem(self.name, what, "check dataset_name: a folder, or a hub id such as owner/name"))

    def list(self) -> Iterator[Entry]:
        """A picture for each row."""
        rows = self._loaded()
        return iter([self._entry(number) for number in range(len(rows))])

    def entry(self, key: str) -> Entry:
        """Mark of a row."""
        return self._entry(self._number(key))

    def exists(self, key: str) -> bool:
        """Whether there is such a row."""
        return key.isdecimal() and int(key) < len(self._loaded())

    def open(self, key: str) -> BinaryIO:
        """A picture's bytes, as a file."""
        return io.BytesIO(self.read(key))

    def read(self, key: str) -> bytes:
        """A picture's bytes, as they are stored. UserError when there are none."""
        number = self._number(key)
        picture = self._told(lambda: self._pictures[number][self._image])
        data, path = (picture.get("bytes"), picture.get("path")) if isinstance(picture, dict) else (None, None)
        if data is not None:
            return bytes(data)
        if not path:
            raise UserError(Problem(self.locate(key), "has no picture", "select the rows that have one"))
        try:
            return Path(path).read_bytes()
        except OSError as error:
            what = f"its picture {path} cannot be read: {error.strerror or error}"
            raise UserError(Problem(self.locate(key), what, "is the dataset whole?")) from error

    def locate(self, key: str) -> str:
        """The dataset, its split and the row."""
        return f"{self._title}: row {key}"

    @cached_property
    def _title(self) -> str:
        place = resolve(self.name)
        name = str(place.absolute()) if place.is_dir() else self.name
        return ": ".join(part for part in (name, self._options.subset, self.split) if part)

    def captions(self) -> TableCaptions:
        """The captions of every row. UserError when there is no such column."""
        self._loaded()
        self._check_column("caption_column", self._caption)
        texts = self._told(lambda: self._whole.select_columns([self._caption])[self._caption])
        found = {_key(number): texts_of(value) for number, value in enumerate(texts)}
        return TableCaptions(f"column {self._caption}", found)

    def _entry(self, number: int) -> Entry:
        return Entry(_key(number), 0, self._mark)

    def _number(self, key: str) -> int:
        rows = self._loaded()
        if key.isdecimal() and int(key) < len(rows):
            return int(key)
        raise UserError(Problem(self.locate(key), f"is no row: there are {len(rows)}", "was the dataset changed?"))

    def _loaded(self) -> Any:
        """The dataset with its pictures as bytes, loaded once."""
        with self._lock:
            if self._pictures is None:
                library = _library(self.name)
                self._whole = self._told(lambda: self._load(library))
                pictures = self._with_bytes(library)
                self._mark = _mark_of(self._whole)
                self._pictures = pictures
        return self._pictures

    def _load(self, library: Any) -> Any:
        place, options = resolve(self.name), self._options
        if not place.is_dir():
            log.info("Loading the dataset %s from the Hugging Face Hub, or from what was downloaded of it", self.name)
            return library.load_dataset(
                self.name, options.subset, split=self.split, revision=self._revision,
                cache_dir=options.cache_dir, num_proc=options.num_proc,
            )  # fmt: skip
        if not any((place / name).is_file() for name in _SAVED):
            return library.load_dataset(
                str(place), options.subset, split=self.split, cache_dir=options.cache_dir, num_proc=options.num_proc
            )
        saved = library.load_from_disk(str(place))
        if isinstance(saved, library.DatasetDict):
            if self.split not in saved:
                raise self._no_split(sorted(saved))
            return saved[self.split]
        if self.split not in ("train", str(saved.split)):
            raise self._no_split([str(saved.split or "train")])
        return saved

    def _no_split(self, there: list[str]) -> UserError:
        what = f"the dataset has no split {self.split}; it has {', '.join(there)}"
        return UserError(Problem(self.name, what, "name one of these as split"))

    def _with_bytes(self, library: Any) -> Any:
        """The column of pictures alone, not decoded. UserError when it holds something else."""
        self._check_column("image_column", self._image)
        kind = self._whole.features[self._image]
        stored = str(kind.dtype) if isinstance(kind, library.Value) else ""
        fields = set(kind) if isinstance(kind, dict) else set()
        if not isinstance(kind, library.Image) and stored not in ("binary", "large_binary") and fields != _FIELDS:
            fix = "name another column as image_column"
            if stored in ("string", "large_string"):
                fix = "addresses of pictures are for type csv: save the table as .csv, .jsonl or .parquet, and name it"
            what = f"image_column {self._image} must hold pictures; it holds {stored or type(kind).__name__}"
            raise UserError(Problem(self.name, what, fix))
        alone = self._whole.select_columns([self._image])
        return self._told(lambda: alone.cast_column(self._image, library.Image(decode=False)))

    def _check_column(self, setting: str, column: str) -> None:
        there = list(self._whole.features)
        if column not in there:
            guess = nearest(column, there)
            hint = f"did you mean {guess}? " if guess else ""
            what = f"{setting}: the dataset has no column {column}; it has {', '.join(there) or 'none'}"
            raise UserError(Problem(self.name, what, f"{hint}Name the right one as {setting}"))

    def _told(self, action: Callable[[], Any]) -> Any:
        """What `action` answers; what goes wrong in the library is told in words."""
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            return action()
        except DatasetNotFoundError as error:
            raise self._not_found(error) from error
        except OfflineModeIsEnabled as error:
            fix = "unset HF_HUB_OFFLINE, or download the dataset before"
            raise StoreLost(Problem(self.name, "offline mode is on, and it is not on this machine", fix)) from error
        except (ConnectionError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
                raise self._not_found(error) from error
            what = f"the hub does not answer as it should: {_first_line(error)}"
            raise StoreLost(Problem(self.name, what, "check the network and try again: what came is kept")) from error
        except (DatasetsError, OSError, ValueError, RuntimeError, LookupError, TypeError, NotImplementedError) as error:
            reason = _first_line(error.__cause__ or error)
            hint = 'name one of them in the block: "huggingface": {"subset": "…"}'
            fix = hint if "Config name is missing" in str(error) else "see what the datasets library says above"
            raise StoreLost(Problem(self.name, f"the dataset cannot be read: {reason}", fix)) from error

    def _not_found(self, error: BaseException) -> StoreLost:
        what = f"there is no such dataset, or it is private or gated: {_first_line(error)}"
        fix = "check dataset_name and revision; for one that is closed, set HF_TOKEN, or log in (hf auth login)"
        return StoreLost(Problem(self.name, what, fix))


_FIELDS = {"bytes", "path"}


def _key(number: int) -> str:
    return f"{number:0{_KEY_DIGITS}}"


def _mark_of(rows: Any) -> int:
    """A number that changes with the content: the library's fingerprint, and sizes and times of the files."""
    files = []
    for each in rows.cache_files:
        status = os.stat(each["filename"])
        files.append((status.st_size, status.st_mtime_ns))
    return int(digest("dataset", str(rows._fingerprint), files)[:15], 16)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _library(name: str) -> Any:
    """The datasets library, silent but for its bars on a terminal. UserError when it is not installed."""
    try:
        import datasets
    except ImportError as error:
        what = f"type huggingface needs the datasets library, which cannot be imported ({error})"
        raise UserError(Problem(name, what, "install it: pip install '.[datasets]'")) from None
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets
