"""Tensors by content key, kept in a folder of shards. What a key depends on is the business of `records`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sana_tune.data import shards
from sana_tune.errors import Problem, UserError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorCache:
    """One tensor per key, of any dtype and shape. Reading may happen from several threads.

    write_batch_size: items per shard. commit_every_s: with slow encoders, items are committed at least this
    often, so that a kill costs no more work than that.
    """

    def __init__(self, folder: str | Path, write_batch_size: int = 128, commit_every_s: float = 30.0):
        self.folder = Path(folder)
        self.write_batch_size = write_batch_size
        self.commit_every_s = commit_every_s
        self.rescan()

    def rescan(self) -> shards.Index:
        """Look at the folder again. The index tells what is damaged (`torn`) or not ours (`foreign`)."""
        self.index = shards.scan(self.folder)
        self._items = dict(self.index.items)
        self._reader = shards.Reader(self.folder)
        return self.index

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    @property
    def bytes(self) -> int:
        """Bytes of all items."""
        return sum(location.length for location in self._items.values())

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not there, each once, in the given order."""
        return [key for key in dict.fromkeys(keys) if key not in self._items]

    def get(self, key: str) -> Tensor:
        """A fresh copy of a tensor, its checksum verified. UserError when it is not there or damaged."""
        location = self._items.get(key)
        if location is None:
            what = f"this cache has no item {key}; it had one, or was to get one, when the run began"
            raise UserError(Problem(str(self.folder), what, "start again: what is missing is made anew"))
        data = self._reader.read(location)
        if not data:
            return torch.empty(location.shape, dtype=_DTYPES[location.dtype])
        return torch.frombuffer(data, dtype=_DTYPES[location.dtype]).reshape(location.shape)

    def writer(self) -> Writer:
        """A context that adds items."""
        return Writer(self)

    def fill(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Add items as they come; an exception on the way (Ctrl-C too) loses none that came."""
        with self.writer() as writer:
            for key, tensor in items:
                writer.add(key, tensor)

    def _commit(self, writer: shards.Writer, items: dict[str, shards.Item]) -> None:
        self._items.update(writer.write(items))


class Writer:
    """Adds items to a cache, shard by shard. Leaving the context commits the rest, after an exception too."""

    def __init__(self, cache: TensorCache):
        self._cache = cache
        self._shards = shards.Writer(cache.folder)
        self._pending: dict[str, shards.Item] = {}
        self._committed_at = 0.0

    def __enter__(self) -> Writer:
        self._shards.__enter__()
        self._committed_at = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self.flush()
        finally:
            self._shards.__exit__(kind, error, trace)

    def add(self, key: str, tensor: Tensor) -> None:
        """Take one item; it is committed with its shard. A key that is there already is left as it is."""
        if key in self._cache or key in self._pending:
            return
        self._pending[key] = _item(tensor)
        full = len(self._pending) >= self._cache.write_batch_size
        if full or time.monotonic() - self._committed_at >= self._cache.commit_every_s:
            self.flush()

    def flush(self) -> None:
        """Commit what was added so far."""
        if self._pending:
            self._cache._commit(self._shards, self._pending)
            self._pending = {}
        self._committed_at = time.monotonic()


def _item(tensor: Tensor) -> shards.Item:
    """A tensor as bytes."""
    if tensor.dtype not in _NAMES:
        raise TypeError(f"the cache holds {', '.join(_DTYPES)}; found {tensor.dtype}")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return shards.Item(_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())
