"""Bytes by key: where pictures and captions come from. A folder today; an object store has the same methods.

Also the one way this package replaces a file: written aside, synced, renamed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sana_tune.errors import Problem, UserError


class Entry(NamedTuple):
    """One file of a store.

    key: its path inside the store, with forward slashes. mtime_ns: time of the last change, ns.
    """

    key: str
    size_bytes: int
    mtime_ns: int


class FolderStore:
    """The files below a folder, read-only. Links are followed; hidden files and folders do not count."""

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
        with _told(self.locate(key)):
            return open(self.locate(key), "rb")

    def read(self, key: str) -> bytes:
        """All bytes of a key. UserError when they cannot be read."""
        with _told(self.locate(key)), open(self.locate(key), "rb") as file:
            return file.read()

    def exists(self, key: str) -> bool:
        """Whether there is a file of this key."""
        return os.path.isfile(self.locate(key))


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
