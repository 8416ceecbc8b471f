"""Python is cut off from the network, loopback excepted: an attempt fails as on a machine without one.

tests/conftest.py imports this for the tests themselves, and puts this folder on PYTHONPATH, so that every Python
process that a test starts imports it too (Python does so with any ``sitecustomize``). Standard library only.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any


class NetworkBlocked(OSError):
    """A test reached for the network. An OSError, as a machine without a network would raise."""

    def __init__(self, host: object):
        super().__init__(errno.ENETUNREACH, f"the network is blocked in tests: {host!r}")


def is_local(host: object) -> bool:
    """Whether a host, as given to connect or getaddrinfo, is this machine."""
    if host is None or host in ("", b""):
        return True
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _check(family: int, address: Any) -> None:
    internet = family in (socket.AF_INET, socket.AF_INET6)
    if internet and isinstance(address, tuple) and not is_local(address[0]):
        raise NetworkBlocked(address[0])


def block() -> None:
    """Guard connect, connect_ex, sendto and the name look-up. Doing it twice is doing it once."""
    if hasattr(socket, "_sana_tune_blocked"):
        return
    plain = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
    look_up = socket.getaddrinfo

    def connect(self: socket.socket, address: Any) -> None:
        _check(self.family, address)
        return plain["connect"](self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        _check(self.family, address)
        return plain["connect_ex"](self, address)

    def sendto(self: socket.socket, data: Any, *rest: Any) -> int:
        _check(self.family, rest[-1])
        return plain["sendto"](self, data, *rest)

    def getaddrinfo(host: Any, *rest: Any, **named: Any) -> Any:
        if not is_local(host):
            raise NetworkBlocked(host)
        return look_up(host, *rest, **named)

    for guard in (connect, connect_ex, sendto):
        setattr(socket.socket, guard.__name__, guard)
    socket.getaddrinfo = getaddrinfo
    socket._sana_tune_blocked = True  # type: ignore[attr-defined]


block()
