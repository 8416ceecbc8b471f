"""A folder of safetensors shards that survives a kill at any moment. Bytes only: no torch, no numpy.

What counts is decided by one rename: a shard is written beside under a name that is never read, synced, and
renamed. So a shard is whole or is not there, and what was committed stays. Every item carries a checksum in
the file's `__metadata__`, and the file's name is a hash of its header: no bit of a shard can change unnoticed.
Layout of a safetensors file: 8 bytes little-endian header length, JSON header, data
(https://github.com/huggingface/safetensors#format); any safetensors reader can open a shard.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from sana_tune.errors import Problem, UserError
from sana_tune.store import sync_folder

SHARD_PREFIX, SHARD_ENDING = "shard-v1-", ".safetensors"  # another layout gets another number
_ASIDE_PREFIX, _ASIDE_ENDING = ".writing-", ".tmp"
BAD_ENDING = ".bad"  # what is set aside is called this way; nothing reads it
_LOCK = ".writers.lock"
_OPEN_FILES = 64  # of a reader; a folder can have more shards than a process may open files
_MARK = {"made_by": "sana_tune"}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_CHECKSUM = 32  # its length in the metadata; the item's form and what it was made of may follow
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1}


class Item(NamedTuple):
    """One tensor as bytes. dtype: its safetensors name ("F32", "BF16"). data: row-major, little-endian.

    source: what it was made of, in words for people (`sources`); nothing depends on it.
    form: how the tensor lies in the data where that is not plainly (`cache` knows the forms), without spaces.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray
    source: str = ""
    form: str = ""

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
    form: str = ""


class TornShard(Exception):
    """A file with a shard's name that is not a whole shard; the message says why."""


class Unusable(UserError):
    """An item that cannot be had. file: its shard.

    lost: its bytes are wrong or gone, so that making it again helps; else the file system failed.
    """

    def __init__(self, path: Path, what: str, fix: str, *, lost: bool):
        self.file = path.name
        self.lost = lost
        super().__init__(Problem(str(path), what, fix))


@dataclass(frozen=True)
class Index:
    """What a folder holds.

    items: key → place. files: whole shards. torn: damaged shards → what is wrong. foreign: other safetensors files;
    they are left alone.
    """

    items: Mapping[str, Location]
    torn: Mapping[str, str]
    foreign: tuple[str, ...]
    files: frozenset[str] = frozenset()

    def __contains__(self, key: str) -> bool:
        return key in self.items

    def __len__(self) -> int:
        return len(self.items)

    @property
    def bytes(self) -> int:
        """Bytes of all items."""
        return sum(location.length for location in self.items.values())


def scan(folder: Path, known: Index | None = None) -> Index:
    """Read the headers of all shards of a folder; nothing is changed. A folder that does not exist is empty.

    known: what was found before; only files that are new since are read. Damaged files are reported in the index;
    UserError only when the folder cannot be listed.
    """
    items: dict[str, Location] = {}
    torn: dict[str, str] = {}
    foreign: list[str] = []
    files: set[str] = set()
    with _told(folder, "read"):
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if known is not None:
        files = set(known.files.intersection(names))
        gone = len(files) < len(known.files)
        kept = known.items.items()
        items = {key: place for key, place in kept if place.file in files} if gone else dict(kept)
    for name in names:
        if name in files or not name.endswith(SHARD_ENDING) or name.startswith("."):
            continue
        if not name.startswith(SHARD_PREFIX):
            foreign.append(name)
            continue
        try:
            items.update(_read_header(folder / name))
            files.add(name)
        except FileNotFoundError:
            continue  # set aside, or removed, since the folder was listed
        except TornShard as error:
            torn[name] = str(error)
    return Index(items, torn, tuple(foreign), frozenset(files))


def sources(folder: Path) -> dict[str, str]:
    """What each item of a folder was made of, by key, as far as that was written down."""
    found: dict[str, str] = {}
    for name in scan(folder).files:
        try:
            table, _ = _header_of(folder / name)
        except (OSError, TornShard):
            continue
        notes = table.get("__metadata__", {})
        found |= {key: text for key, note in notes.items() if (text := note.partition(" ")[2]) and key in table}
    return found


@dataclass(frozen=True)
class Damage:
    """A bad shard. items: the keys whose checksums fail; () when not even its header can be trusted."""

    file: str
    what: str
    items: tuple[str, ...] = ()


def verify(folder: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
    """Read everything of a folder and compare every checksum; nothing is changed. report(done, total) counts files."""
    index = scan(folder)
    found = [Damage(name, what) for name, what in index.torn.items()]
    for done, name in enumerate(sorted(index.files), start=1):
        try:
            sound, lost = _examined(folder / name)
        except TornShard as error:
            found.append(Damage(name, str(error)))
        except FileNotFoundError:
            pass
        else:
            if lost:
                what = f"{len(lost)} of its {len(lost) + len(sound)} items do not match their checksums"
                found.append(Damage(name, what, tuple(lost)))
        report(done, len(index.files))
    return sorted(found, key=lambda damage: damage.file)


class _Open:
    """A file opened for reading. It is closed when nobody holds this object any more, so threads may share it."""

    def __init__(self, path: Path):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at the very end `os` may be gone
        if self.descriptor >= 0:
            close(self.descriptor)


class Reader:
    """The items of one folder, through a few files that stay open. Safe to share between threads.

    Files are read, not mapped: one that is cut off while it is mapped would end the process with SIGBUS.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, location: Location) -> bytearray:
        """A fresh, writable copy of an item's bytes. Unusable when they are not what was written."""
        try:
            data = self._bytes(location)
        except FileNotFoundError as error:
            if not self.folder.is_dir():
                fix = "see that its disk is there again, then start again: the run goes on from its last checkpoint"
                raise Unusable(self.folder, "this cache folder is gone", fix, lost=False) from error
            raise self._lost(location, "is gone") from error
        except OSError as error:
            fix = "see that the disk is sound and you may read it, then start again"
            what = f"this cache file cannot be read: {error.strerror or error}"
            raise Unusable(self.folder / location.file, what, fix, lost=False) from error
        if data is None or Item(location.dtype, location.shape, data).checksum != location.checksum:
            self.forget(location.file)
            raise self._lost(location, "is damaged: an item does not match its checksum")
        return data

    def forget(self, file: str) -> None:
        """Close a file, so that it is opened anew the next time."""
        with self._lock:
            self._files.pop(file, None)

    def _bytes(self, location: Location) -> bytearray | None:
        """The bytes that are there now; None when the file ends before."""
        if not location.length:
            return bytearray()
        file = self._open(location.file)
        data, got = bytearray(location.length), 0
        with memoryview(data) as view:
            while got < location.length:
                more = os.preadv(file.descriptor, [view[got:]], location.offset + got)
                if not more:
                    return None
                got += more
        return data

    def _open(self, name: str) -> _Open:
        with self._lock:
            if (file := self._files.get(name)) is not None:
                self._files.move_to_end(name)
                return file
        file = _Open(self.folder / name)
        with self._lock:
            file = self._files.setdefault(name, file)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def _lost(self, location: Location, what: str) -> Unusable:
        fix = "start again: what is damaged is set aside, and its items are made anew"
        return Unusable(self.folder / location.file, f"this cache file {what}", fix, lost=True)


class Writer:
    """Writes shards into a folder; use as a context. Several processes may write into one folder at once.

    torn: names of shards that were found torn; None = look for them. Opening it makes the folder, sets torn shards
    aside (renamed to *.bad) and, when no other writer lives, removes what killed writers left. UserError when the
    folder cannot be written.
    alone: whether no other writer lived when this one was opened.
    """

    def __init__(self, folder: Path, torn: Iterable[str] | None = None):
        self.folder = folder
        self.alone = False
        self._torn = torn
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Writer:
        with _told(self.folder, "written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "ab")
        try:
            with _told(self.folder, "written"), _shared(self._lock) as self.alone:
                for left in self.folder.glob(f"{_ASIDE_PREFIX}*{_ASIDE_ENDING}") if self.alone else ():
                    left.unlink(missing_ok=True)
            for name in scan(self.folder).torn if self._torn is None else self._torn:
                self.mend(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
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
        name = _name_of(header)
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
            key: Location(
                name, 8 + len(header) + places[key], len(item.data), item.dtype, item.shape, checksums[key], item.form
            )
            for key, item in items.items()
        }

    def mend(self, name: str) -> tuple[str, ...]:
        """Look at a shard again and set it aside if it is damaged; what is sound in it goes to a new one first.

        The keys that are lost by it, as far as they are known.
        """
        try:
            sound, lost = _examined(self.folder / name)
        except FileNotFoundError:
            return ()
        except TornShard:
            sound, lost = {}, []
        else:
            if not lost:
                return ()
        if sound:
            self.write(sound)
        with _told(self.folder, "written"):
            _set_aside(self.folder / name)
        return tuple(lost)

    def prune(self, keep: Callable[[str], bool]) -> Pruned:
        """Remove the items that are not to be kept, and second copies. Shards that are partly kept are rewritten.

        What stays is committed before its old shard goes, so that a kill loses nothing. A damaged item of a shard
        that is rewritten goes too.
        """
        index = scan(self.folder)
        by_file: dict[str, list[str]] = {name: [] for name in index.files}
        for key, place in index.items.items():
            by_file[place.file].append(key)
        items = bytes_ = 0
        for name, keys in sorted(by_file.items()):
            path = self.folder / name
            kept = [key for key in keys if keep(key)]
            with _told(self.folder, "written"):
                before = path.stat().st_size
                if kept and len(kept) == _count(path):
                    continue
                sound = _examined(path)[0] if kept else {}
                if again := {key: sound[key] for key in kept if key in sound}:
                    (new,) = {place.file for place in self.write(again).values()}
                    bytes_ -= (self.folder / new).stat().st_size
                path.unlink(missing_ok=True)
                sync_folder(self.folder)
            items += len(keys) - len(kept)
            bytes_ += before
        return Pruned(items, bytes_)


class Pruned(NamedTuple):
    """What a pruning removed; bytes: of files, by which the folder is smaller now."""

    items: int
    bytes: int


def set_aside(folder: Path) -> list[Path]:
    """The files of a folder that were damaged and set aside."""
    with _told(folder, "read"):
        return sorted(folder.glob(f"{SHARD_PREFIX}*{BAD_ENDING}*")) if folder.is_dir() else []


def other_writers(folder: Path) -> bool:
    """Whether a process is writing into the folder right now. False where that cannot be known."""
    try:
        with open(folder / _LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _name_of(header: bytes) -> str:
    """A shard's name: the hash of its header, which holds the checksums of the rest."""
    return f"{SHARD_PREFIX}{hashlib.blake2b(header, digest_size=12).hexdigest()}{SHARD_ENDING}"


def _set_aside(path: Path) -> None:
    """Rename a file so that it is not read again; another one of that name, set aside before, stays."""
    names = (f"{path.name}{BAD_ENDING}{number or ''}" for number in range(1000))
    target = next(name for name in names if not (path.parent / name).exists())
    try:
        os.replace(path, path.with_name(target))
    except FileNotFoundError:
        pass  # another process was quicker


def _header(items: Mapping[str, Item], checksums: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, padded with spaces to whole 8 bytes, and each item's offset in the data."""
    notes = {key: f"{checksum}{items[key].form} {items[key].source}".rstrip() for key, checksum in checksums.items()}
    table: dict[str, object] = {"__metadata__": {**_MARK, **notes}}
    places: dict[str, int] = {}
    end = 0
    for key, item in items.items():
        places[key], end = end, end + len(item.data)
        table[key] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [places[key], end]}
    text = json.dumps(table, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8), places


def _header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a shard as JSON, and where its data begins. TornShard unless it is the one that was written."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise TornShard("it is cut off, or is no safetensors file")
        header = file.read(length)
    if _name_of(header) != path.name:
        raise TornShard("its header is not the one that was written under this name")
    try:
        table = json.loads(header)
        end = max((entry["data_offsets"][1] for key, entry in table.items() if key != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise TornShard("its header cannot be read") from error
    if size != 8 + length + end:
        raise TornShard("it is cut off" if size < 8 + length + end else "something stands behind its end")
    return table, 8 + length


def _count(path: Path) -> int:
    """How many items a shard has."""
    return len(_header_of(path)[0]) - 1


def _read_header(path: Path) -> dict[str, Location]:
    """The items of one shard, by key. Raises TornShard unless the file is whole."""
    try:
        table, start = _header_of(path)
        name, notes = path.name, table.pop("__metadata__")
        found = {}
        for key, entry in table.items():
            begin, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if end - begin != _bytes_of(dtype, shape) or begin < 0:
                raise TornShard(f"its header is wrong at the item {key}")
            found[key] = Location(name, start + begin, end - begin, dtype, shape, *_noted(notes[key]))
        return found
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TornShard(f"it cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornShard("its header cannot be read") from error


def _noted(note: str) -> tuple[str, str]:
    """Checksum and form of an item, from what is noted of it: `<checksum><form> <source>`."""
    return note[:_CHECKSUM], note[_CHECKSUM:].partition(" ")[0]


def _examined(path: Path) -> tuple[dict[str, Item], list[str]]:
    """The sound items of a shard, and the keys of the others. TornShard as `_read_header`."""
    places, notes = _read_header(path), _header_of(path)[0]["__metadata__"]
    sound: dict[str, Item] = {}
    lost: list[str] = []
    with open(path, "rb") as file:
        for key, place in places.items():
            try:
                file.seek(place.offset)
                data = file.read(place.length)
            except OSError:
                data = b""
            item = Item(place.dtype, place.shape, data, notes[key].partition(" ")[2], place.form)
            if len(data) == place.length and item.checksum == place.checksum:
                sound[key] = item
            else:
                lost.append(key)
    return sound, lost


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
        fix = _REMEDIES.get(error.errno or 0, _REMEDY) if verb == "written" else _READING
        raise UserError(Problem(str(folder), what, fix)) from error


_REMEDY = "make room on the disk, or choose another cache folder"
_READING = "see that its disk is there and that you may read it, then start again"
_AGAIN = "then start again: what was committed stays, and caching goes on from there"
_READ_ONLY = (
    "something is missing in it, so it must be written: make it writable, or set cache_dir to a folder of your own; "
    "reading alone works once `sana_tune cache warm` has made everything"
)
_REMEDIES = {
    errno.ENOSPC: f"make room on the disk or choose another cache folder (cache_dir), {_AGAIN}",
    errno.EDQUOT: f"your quota of disk space is used up: make room or choose another cache folder, {_AGAIN}",
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
    errno.ENOTDIR: "there is a file in its place: name another folder (cache_dir)",
    errno.ENOENT: f"the folder is gone: see that its disk is there, {_AGAIN}",
    errno.ESTALE: f"the folder is gone: see that its disk is there, {_AGAIN}",
    errno.EIO: f"the disk fails: see that it is sound, {_AGAIN}",
}
