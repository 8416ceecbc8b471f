"""File systems of one's own for a forked process: a small disk that gets full, a folder that is read-only.

Linux mount namespaces (https://man7.org/linux/man-pages/man7/mount_namespaces.7.html), as root or in a user namespace;
what is mounted is gone with the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.journeys.kit import Child

_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_NO_MOUNTS = 77  # exit code of a child that may not mount


def with_own_mounts(function: Callable[[], int], log: Path) -> Child:
    """The function in a fork that may mount; the test is skipped where nobody may."""

    def life() -> int:
        try:
            _enter()
        except OSError as error:
            print(error)
            return _NO_MOUNTS
        return function()

    child = Child(life, log)
    if child.wait() == _NO_MOUNTS:
        pytest.skip(f"no mounts here: {child}")
    return child


def small_disk(folder: Path, bytes_: int) -> None:
    """An empty disk of this size at a folder, which is made; called again, that disk gets another size."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = _REMOUNT if os.path.ismount(folder) else 0
    _mount("tmpfs", folder, "tmpfs", flags, f"size={bytes_}")


def read_only(folder: Path) -> None:
    """Nobody may write into a folder from now on."""
    _mount(str(folder), folder, None, _BIND, None)
    _mount(None, folder, None, _BIND | _REMOUNT | _READ_ONLY, None)


def _enter() -> None:
    if not sys.platform.startswith("linux"):
        raise OSError("mount namespaces are Linux's")
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USERS)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, Path("/"), None, _RECURSIVE | _PRIVATE, None)


def _mount(source: str | None, target: Path, kind: str | None, flags: int, options: str | None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, str(target), kind, options)]
    _call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if vars(type(libc)).get("__getitem__") is None or libc[name](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
