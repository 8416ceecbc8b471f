"""Bytes by key: where pictures and captions come from. A folder here; `data.stores.open_store` knows the others.

Also the one way this package replaces a file: written aside, synced, renamed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from sana_tune.errors import Problem, UserError


class Entry(NamedTuple):
    """One file of a store.

    key: its path inside the store, with forward slashes. size_bytes: -1 while it is not known.
    mtime_ns: time of the last change, ns; where a store has a better mark of what changed (an ETag), a number of that.
    """

    key: str
    size_bytes: int
    mtime_ns: int


class StoreLost(UserError):
    """The whole place is gone, or shut: what a run does then is stop, and not leave out one file after the other."""


class Store(Protocol):
    """Files by key, for reading. Threads may share one. What cannot be read is a UserError, StoreLost for all of it.

    all_pictures: whether everything in it is a picture, whatever its name. far_away: whether reads wait for a network.
    """

    all_pictures: bool
    far_away: bool

    def check(self) -> None:
        """UserError when there is no such place, or it may not be read."""
        ...

    def list(self) -> Iterator[Entry]:
        """Every file, sorted by key."""
        ...

    def entry(self, key: str) -> Entry:
        """One file, as `list` gives it. UserError when it is not there."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is a file of this key."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A file to read parts of; no more is fetched than is asked for."""
        ...

    def read(self, key: str) -> bytes:
        """All bytes of a file."""
        ...

    def locate(self, key: str) -> str:
        """Where a file is, for messages and to remember it by: a path or an address without secrets."""
        ...


class FolderStore:
    """The files below a folder, read-only. Links are followed; hidden files and folders do not count."""

    all_pictures = False
    far_away = False

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._prefix = os.path.join(os.path.abspath(root), "")

    def check(self) -> None:
        """UserError when there is no such folder."""
        if not os.path.isdir(self.root):
            found = "is not a folder" if os.path.exists(self.root) else "does not exist"
            looked = "" if self.root.is_absolute() else f" (looked in {os.getcwd()})"
            raise UserError(Problem(str(self.root), f"the folder {found}{looked}", "name an existing folder"))

    def list(self) -> Iterator[Entry]:
        """Every file, sorted by key. UserError when the folder is missing or a part of it cannot be read."""
        self.check()
        return iter(sorted(_walk(str(self.root), "", ())))  # keys come first, and no two are the same

    def locate(self, key: str) -> str:
        """The absolute path of a key: for messages, and to remember a file by."""
        return self._prefix + (key if os.sep == "/" else key.replace("/", os.sep))

    def open(self, key: str) -> BinaryIO:
        """The file of a key, opened for reading. UserError when it cannot be."""
        try:
            return open(self.locate(key), "rb")
        except OSError:
            with self._told(key):
                raise

    def read(self, key: str) -> bytes:
        """All bytes of a key. UserError when they cannot be read."""
        with self._told(key), open(self.locate(key), "rb") as file:
            return file.read()

    def entry(self, key: str) -> Entry:
        """Size and time of a key. UserError when it is not there."""
        with self._told(key):
            status = os.stat(self.locate(key))
            return Entry(key, status.st_size, status.st_mtime_ns)

    def exists(self, key: str) -> bool:
        """Whether there is a file of this key."""
        return os.path.isfile(self.locate(key))

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """A file that cannot be read is told; when the whole folder is gone, that is told instead (StoreLost)."""
        try:
            with _told(self.locate(key)):
                yield
        except UserError as error:
            if os.path.isdir(self.root):
                raise
            what = "the folder of the pictures was there and is gone now"
            fix = "bring it back (is a disk or a network folder still mounted?) and start again: what is cached is kept"
            raise StoreLost(Problem(str(self.root), what, fix)) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: at every moment it is the old one or the new one, whole.

    Written to a hidden file beside it, synced, renamed; then the folder is synced. UserError when that fails.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _told(str(path), verb="written", fix="make room on the disk, or choose a place you may write to"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _told(path: str, verb: str = "read", fix: str = "check that it exists and that you may read it") -> Iterator[None]:
    """Turn an error of the file system into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(Problem(path, f"cannot be {verb}: {error.strerror or error}", fix)) from error


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """The files of a folder and its subfolders.

    above: (device, inode) of the folders on the way here; a link back to one of them is a loop and is not taken.
    """
    with _told(folder):
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as found:
            names = [name for name in found if not name.name.startswith(".")]
    for name in names:
        key = prefix + name.name
        if name.is_dir():
            yield from _walk(name.path, key + "/", (*above, here))
        elif name.is_file():  # a dangling link is neither
            status = name.stat()
            yield Entry(key, status.st_size, status.st_mtime_ns)
