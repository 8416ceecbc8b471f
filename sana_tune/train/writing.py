"""A snapshot → the files of a checkpoint, each hashed while it is written and synced; the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_tune.store import sync_folder
from sana_tune.train import folders
from sana_tune.train.snapshot import Snapshot

OPTIMIZER = "optimizer.pt"
CHUNK_BYTES = 2**20  # after each it is seen whether the write is still wanted, and in a hurry
REST = 8.0  # times as long as a piece took
LONGEST_REST_S = 0.1

# https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Abandoned(Exception):
    """The run is left at once, so that the write was given up."""


@dataclass(frozen=True)
class Terms:
    """How a write goes on. abandoned: once it is set, nothing more is written.

    rests: after each piece, since training wants the same cores, memory and disk. hurry: somebody waits for the write,
    so that it rests no more. A thread of low priority would not do: where other programs have the cores it would be put
    off while it holds Python's lock, and training with it.
    """

    rests: bool = False
    abandoned: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)

    def do(self, work: Callable[[], None]) -> None:
        """Do a piece of work."""
        started = time.perf_counter()
        work()
        if self.rests and not self.hurry.is_set():
            self.hurry.wait(min(LONGEST_REST_S, REST * (time.perf_counter() - started)))


class HashedFile:
    """A new file whose SHA-256 is taken while it is written.

    What goes wrong is kept and raised by `close` alone: torch's writer in between knows no reason but its own.
    """

    def __init__(self, path: Path, terms: Terms):
        self._file = open(path, "xb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0
        self._terms = terms
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Bytes, or anything with a buffer."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), CHUNK_BYTES):
            if self._terms.abandoned.is_set() or self._error is not None:
                break
            chunk = view[begin : begin + CHUNK_BYTES]
            self._terms.do(partial(self._append, chunk))
        return len(view)

    def _append(self, chunk: memoryview) -> None:
        self._hash.update(chunk)
        self._size += len(chunk)
        try:
            while chunk:
                chunk = chunk[self._file.write(chunk) :]
        except OSError as error:
            self._error = error

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> dict[str, Any]:
        """Sync and close. Answers the manifest's entry. Raises OSError, and Abandoned."""
        try:
            if self._terms.abandoned.is_set():
                raise Abandoned
            if self._error is not None:
                raise self._error
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return {"sha256": self._hash.hexdigest(), "size": self._size}


class Writing:
    """The files of one checkpoint, in a folder that is not its own yet."""

    def __init__(self, staged: Path, terms: Terms):
        self.staged = staged
        self._terms = terms
        self._entries: dict[str, dict[str, Any]] = {}

    def all_of(self, snapshot: Snapshot, identity: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Write everything. manifest: what stands there besides the files. Raises OSError and Abandoned."""
        self._model(snapshot, snapshot.layout.weights, snapshot.weights)
        if snapshot.average:
            self._model(snapshot, snapshot.layout.average, snapshot.average)
        file = self._open(OPTIMIZER)
        try:
            torch.save(dict(snapshot.optimizer), file)  # pyright: ignore[reportArgumentType]
        finally:
            self._close(OPTIMIZER, file)
        self._json(folders.PROGRESS, {**snapshot.progress.to_json(), "run": dict(identity)})
        entries = {name: self._entries[name] for name in sorted(self._entries)}
        self._json(folders.MANIFEST, {**manifest, "files": entries})
        for folder in [each for each in self.staged.rglob("*") if each.is_dir()]:
            sync_folder(folder)
        sync_folder(self.staged)

    def _model(self, snapshot: Snapshot, name: str, state: Mapping[str, Tensor]) -> None:
        """One safetensors file and its config, as diffusers' `from_pretrained` or LyCORIS reads them."""
        folder = (self.staged / name).parent
        folder.mkdir(exist_ok=True)
        self._json((folder / snapshot.layout.config).relative_to(self.staged).as_posix(), snapshot.config)
        file = self._open(name)
        try:
            write_tensors(file, state)
        finally:
            self._close(name, file)

    def _json(self, name: str, values: Mapping[str, Any]) -> None:
        file = self._open(name)
        file.write((json.dumps(values, indent=1) + "\n").encode("utf-8"))
        self._close(name, file)

    def _open(self, name: str) -> HashedFile:
        return HashedFile(self.staged / name, self._terms)

    def _close(self, name: str, file: HashedFile) -> None:
        self._entries[name] = file.close()


def write_tensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, as the library writes it: wide dtypes first, then by name. Tensors may be anywhere.

    By hand, so that it is hashed on the way, and a full disk is told as such.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
