"""What the real wandb wrote in offline mode: its file is a LevelDB log of protobuf records.

https://github.com/google/leveldb/blob/main/doc/log_format.md, after seven bytes of a header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class Kept:
    """One offline run: its identity, settings, the lines of its history, the pictures beside it, its exit code."""

    project: str = ""
    name: str = ""
    id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None


def read_runs(folder: Path) -> list[Kept]:
    """Every offline run below a folder, the oldest first."""
    paths = sorted(folder.rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return [_read(path) for path in paths if not path.parent.is_symlink()]


def _read(path: Path) -> Kept:
    from wandb.proto.wandb_internal_pb2 import Record

    kept = Kept(files=sorted(file.name for file in path.parent.rglob("*.png")))
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("run"):
            kept.project, kept.name, kept.id = record.run.project, record.run.display_name, record.run.run_id
            kept.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            kept.history.append(items)
        elif record.HasField("exit"):
            kept.exit_code = record.exit.exit_code
    return kept


def _records(data: bytes) -> Iterator[bytes]:
    place, whole = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        part = data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        whole = part if kind in (_FULL, _FIRST) else whole + part
        if kind in (_FULL, _LAST):
            yield whole
