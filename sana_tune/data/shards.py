"""A folder of safetensors shards that survives a kill at any moment. Bytes only: no torch, no numpy.

What counts is decided by one rename: a shard is written beside under a name that is never read, synced, and
renamed. So a shard is whole or is not there, and what was committed stays. Every item carries a checksum in
the file's `__metadata__`. Layout of a safetensors file: 8 bytes little-endian header length, JSON header,
data (https://github.com/huggingface/safetensors#format); any safetensors reader can open a shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from sana_tune.errors import Problem, UserError
from sana_tune.store import sync_folder

SHARD_PREFIX, SHARD_ENDING = "shard-v1-", ".safetensors"  # another layout gets another number
_ASIDE_PREFIX, _ASIDE_ENDING = ".writing-", ".tmp"
_LOCK = ".writers.lock"
_MARK = {"made_by": "sana_tune"}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1}


class Item(NamedTuple):
    """One tensor as bytes. dtype: its safetensors name ("F32", "BF16"). data: row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray

    @property
    def checksum(self) -> str:
        """BLAKE2b over dtype, shape and data, 128 bits in hex."""
        hashed = hashlib.blake2b(f"{self.dtype}{list(self.shape)}".encode(), digest_size=16)
        hashed.update(self.data)
        return hashed.hexdigest()


class Location(NamedTuple):
    """Where an item lies (file name, byte offset and length) and what it must be."""

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    checksum: str


class TornShard(Exception):
    """A file with a shard's name that is not a whole shard; the message says why."""


@dataclass(frozen=True)
class Index:
    """What a folder holds.

    items: key → place. torn: damaged shards → what is wrong. foreign: other safetensors files; they are left alone.
    """

    items: Mapping[str, Location]
    torn: Mapping[str, str]
    foreign: tuple[str, ...]

    def __contains__(self, key: str) -> bool:
        return key in self.items

    def __len__(self) -> int:
        return len(self.items)

    @property
    def bytes(self) -> int:
        """Bytes of all items."""
        return sum(location.length for location in self.items.values())


def scan(folder: Path) -> Index:
    """Read the headers of all shards of a folder; nothing is changed. A folder that does not exist is empty.

    Damaged files are reported in the index; UserError only when the folder cannot be listed.
    """
    items: dict[str, Location] = {}
    torn: dict[str, str] = {}
    foreign: list[str] = []
    with _told(folder, "read"):
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if not name.endswith(SHARD_ENDING) or name.startswith("."):
            continue
        if not name.startswith(SHARD_PREFIX):
            foreign.append(name)
            continue
        try:
            items.update(_read_header(folder / name))
        except TornShard as error:
            torn[name] = str(error)
    return Index(items, torn, tuple(foreign))


class Reader:
    """The items of one folder, through memory maps opened as needed. Safe to share between threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def read(self, location: Location) -> bytearray:
        """A fresh, writable copy of an item's bytes. UserError when they are not what was written."""
        try:
            mapped = self._maps.get(location.file) or self._open(location.file)
            data = bytearray(mapped[location.offset : location.offset + location.length])
        except (OSError, ValueError) as error:
            raise self._unusable(location, f"cannot be read: {error}") from error
        if Item(location.dtype, location.shape, data).checksum != location.checksum:
            raise self._unusable(location, "is damaged: an item does not match its checksum")
        return data

    def _open(self, name: str) -> mmap.mmap:
        with open(self.folder / name, "rb") as file:
            return self._maps.setdefault(name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _unusable(self, location: Location, what: str) -> UserError:
        path = self.folder / location.file
        return UserError(
            Problem(str(path), f"this cache file {what}", "delete it and start again: its items are made anew")
        )


class Writer:
    """Writes shards into a folder; use as a context. Several processes may write into one folder at once.

    Opening it makes the folder, sets damaged shards aside (renamed to *.bad) and, when no other writer lives,
    removes what killed writers left. UserError when the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Writer:
        with _told(self.folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "ab")
            with _shared(self._lock) as alone:
                for left in self.folder.glob(f"{_ASIDE_PREFIX}*{_ASIDE_ENDING}") if alone else ():
                    left.unlink(missing_ok=True)
            for name in scan(self.folder).torn:
                os.replace(self.folder / name, self.folder / f"{name}.bad")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, items: Mapping[str, Item]) -> dict[str, Location]:
        """Commit items as one shard; when this returns they survive anything. Where each one lies.

        The shard's name is made of its content, so writing the same items twice leaves one file.
        """
        checksums = {key: item.checksum for key, item in items.items()}
        header, places = _header(items, checksums)
        name = f"{SHARD_PREFIX}{hashlib.blake2b(header, digest_size=12).hexdigest()}{SHARD_ENDING}"
        aside = self.folder / f"{_ASIDE_PREFIX}{secrets.token_hex(8)}{_ASIDE_ENDING}"
        with _told(self.folder, "written"):
            try:
                with open(aside, "xb") as file:
                    file.write(len(header).to_bytes(8, "little") + header)
                    file.writelines(item.data for item in items.values())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, self.folder / name)
            finally:
                aside.unlink(missing_ok=True)
            sync_folder(self.folder)
        return {
            key: Location(name, 8 + len(header) + places[key], len(item.data), *item[:2], checksums[key])
            for key, item in items.items()
        }


def _header(items: Mapping[str, Item], checksums: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, padded with spaces to whole 8 bytes, and each item's offset in the data."""
    table: dict[str, object] = {"__metadata__": {**_MARK, **checksums}}
    places: dict[str, int] = {}
    end = 0
    for key, item in items.items():
        places[key], end = end, end + len(item.data)
        table[key] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [places[key], end]}
    text = json.dumps(table, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8), places


def _read_header(path: Path) -> dict[str, Location]:
    """The items of one shard, by key. Raises TornShard unless the file is whole."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise TornShard("it is cut off, or is no safetensors file")
            table = json.loads(file.read(length))
        checksums = table.pop("__metadata__")
        found = {}
        for key, entry in table.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if end - begin != _bytes_of(entry["dtype"], shape) or not 0 <= begin <= end <= size - 8 - length:
                raise TornShard(f"it is cut off, or its header is wrong at the item {key}")
            found[key] = Location(path.name, 8 + length + begin, end - begin, entry["dtype"], shape, checksums[key])
        return found
    except OSError as error:
        raise TornShard(f"it cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornShard("its header cannot be read") from error


def _bytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    size = _ITEM_BYTES[dtype]
    for side in shape:
        size *= side
    return size


@contextmanager
def _shared(lock: BinaryIO) -> Iterator[bool]:
    """Share a folder with other writers until the lock file is closed; True inside when there is no other
    one.

    On a file system without locks, False: then nobody's leftovers are removed.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = False
    except OSError:
        yield False
        return
    else:
        alone = True
    yield alone
    fcntl.flock(lock, fcntl.LOCK_SH)  # from alone: lets the others in


@contextmanager
def _told(folder: Path, verb: str) -> Iterator[None]:
    """Turn an error of the file system into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        what = f"this cache folder cannot be {verb}: {error.strerror or error}"
        raise UserError(Problem(str(folder), what, "make room on the disk, or choose another cache folder")) from error
