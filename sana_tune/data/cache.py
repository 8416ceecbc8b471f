"""Tensors by content key, kept in a folder of shards. What a key depends on is the business of `records`."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
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
_SETTLED_NS = 100_000_000  # a folder's time of change is this coarse, at most: a younger one may hide another change


class Tensors(Protocol):
    """What training reads: one tensor per key."""

    def get(self, key: str) -> Tensor: ...


class LostItem(UserError):
    """An item that is not there, or not what was written; making it again mends that. file: None = it is in none."""

    def __init__(self, cache: TensorCache, key: str, file: str | None, *problems: Problem):
        self.cache = cache
        self.key = key
        self.file = file
        super().__init__(*problems)


class TensorCache:
    """One tensor per key, of any dtype and shape. Reading may happen from several threads.

    write_batch_size: items per shard. commit_every_s: with slow encoders, items are committed at least this
    often, so that a kill costs no more work than that. compress: whether what is added is packed where that saves
    room; packed and plain items stand side by side, and both are always read.
    """

    def __init__(
        self,
        folder: str | Path,
        write_batch_size: int = 128,
        commit_every_s: float = 30.0,
        *,
        compress: bool = False,
    ):
        self.folder = Path(folder)
        self.write_batch_size = write_batch_size
        self.commit_every_s = commit_every_s
        self.compress = compress
        self.rescan()

    def rescan(self) -> shards.Index:
        """Look at the folder again. The index tells what is damaged (`torn`) or not ours (`foreign`)."""
        self._reader = shards.Reader(self.folder)
        return self._scan(None)

    def refresh(self) -> None:
        """See what other processes wrote or removed since. Costs next to nothing when they did nothing."""
        if self._changed_ns() != self._seen_ns or self._seen_ns > self._looked_ns - _SETTLED_NS:
            self._scan(self.index)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    @property
    def bytes(self) -> int:
        """Bytes of all items."""
        return sum(location.length for location in self._items.values())

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of an item, which is not read for that; None when it is not there."""
        location = self._items.get(key)
        return None if location is None else location.shape

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not there, each once, in the given order."""
        return [key for key in dict.fromkeys(keys) if key not in self._items]

    def get(self, key: str) -> Tensor:
        """A fresh copy of a tensor, its checksum verified. LostItem when it is not there or damaged."""
        location = self._items.get(key)
        if location is None:
            what = f"this cache has no item {key}; it had one, or was to get one, when the run began"
            raise LostItem(
                self, key, None, Problem(str(self.folder), what, "start again: what is missing is made anew")
            )
        try:
            data = self._reader.read(location)
        except shards.Unusable as error:
            if not error.lost:
                raise
            raise LostItem(self, key, error.file, *error.problems) from error
        return _tensor(data, location)

    def set_aside_torn(self) -> dict[str, str]:
        """Set the shards aside that are known to be torn: file → what is wrong with it. They stay where nobody may
        write; nothing of them is ever read."""
        torn = dict(self.index.torn)
        if torn:
            try:
                with shards.Writer(self.folder, torn):
                    pass
            except UserError:
                return torn
            self._scan(self.index)
        return torn

    def mend(self, lost: LostItem) -> None:
        """Set the damaged shard of a lost item aside, its sound items kept; afterwards what is lost is `missing`.

        UserError when the folder cannot be written.
        """
        if lost.file is not None and (self.folder / lost.file).exists():
            with shards.Writer(self.folder, ()) as writer:
                writer.mend(lost.file)
        self.rescan()

    def prune(self, keep: Callable[[str], bool]) -> shards.Pruned:
        """Remove every item that is not to be kept."""
        with shards.Writer(self.folder) as writer:
            pruned = writer.prune(keep)
        self.rescan()
        return pruned

    def writer(self) -> Writer:
        """A context that adds items."""
        return Writer(self)

    def fill(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Add items as they come; an exception on the way (Ctrl-C too) loses none that came."""
        with self.writer() as writer:
            for key, tensor in items:
                writer.add(key, tensor)

    def _scan(self, known: shards.Index | None) -> shards.Index:
        self._looked_ns = time.time_ns()
        self._seen_ns = self._changed_ns()
        self.index = shards.scan(self.folder, known)
        self._items = dict(self.index.items)
        return self.index

    def _changed_ns(self) -> int:
        """When the folder was changed last; 0 when there is none."""
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:
            return 0

    def _commit(self, writer: shards.Writer, items: dict[str, shards.Item]) -> None:
        self._items.update(writer.write(items))


class Writer:
    """Adds items to a cache, shard by shard. Leaving the context commits the rest, after an exception too.

    alone: whether no other process was writing into the folder when this one began.
    """

    def __init__(self, cache: TensorCache):
        self._cache = cache
        self._shards = shards.Writer(cache.folder, cache.index.torn)
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

    @property
    def alone(self) -> bool:
        return self._shards.alone

    def add(self, key: str, tensor: Tensor, source: str = "") -> None:
        """Take one item; it is committed with its shard. A key that is there already is left as it is.

        source: what it was made of, in words for people.
        """
        if key in self._cache or key in self._pending:
            return
        item = _item(tensor, source)
        self._pending[key] = _packed(item) if self._cache.compress else item
        full = len(self._pending) >= self._cache.write_batch_size
        if full or time.monotonic() - self._committed_at >= self._cache.commit_every_s:
            self.flush()

    def flush(self) -> None:
        """Commit what was added so far."""
        if self._pending:
            pending, self._pending = self._pending, {}
            self._cache._commit(self._shards, pending)
        self._committed_at = time.monotonic()


class OnDemand:
    """Reads like a cache and makes what is missing when it is asked for. Threads may share it; `close()` it.

    cache: what is there, and where `store` puts what is made. make: key → tensor, or None for a key that is not its
    business, which then must be in the cache. store: whether what was made is kept on the disk.
    """

    def __init__(self, cache: TensorCache, make: Callable[[str], Made | None], *, store: bool):
        self.cache = cache
        self._make = make
        self._store = store
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        self._fresh: dict[str, Tensor] = {}  # made, and not yet committed

    def get(self, key: str) -> Tensor:
        """The tensor of a key. LostItem as `TensorCache.get`; what making it raises."""
        with self._lock:
            if key in self._fresh:
                return self._fresh[key].clone()
            if self._store and key in self.cache:
                return self.cache.get(key)
            made = self._make(key)
            if made is None:
                return self.cache.get(key)
            if self._store:
                self._keep(key, *made)
            return made[0].clone()

    def close(self) -> None:
        """Commit what was made."""
        with self._lock:
            if self._writer is not None:
                writer, self._writer = self._writer, None
                writer.__exit__(None, None, None)
            self._fresh.clear()

    def _keep(self, key: str, tensor: Tensor, source: str) -> None:
        if self._writer is None:
            self._writer = self.cache.writer().__enter__()
        self._fresh[key] = tensor
        self._writer.add(key, tensor, source)
        if key in self.cache:  # that filled a shard
            self._fresh.clear()


Made = tuple[Tensor, str]  # a tensor, and what it was made of


class InMemory:
    """Reads a cache once and keeps in main memory what was read."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._kept: dict[str, Tensor] = {}

    def get(self, key: str) -> Tensor:
        """The tensor of a key; nobody may change it."""
        if (kept := self._kept.get(key)) is None:
            kept = self._kept[key] = self._tensors.get(key)
        return kept


def _item(tensor: Tensor, source: str = "") -> shards.Item:
    """A tensor as bytes."""
    if tensor.dtype not in _NAMES:
        raise TypeError(f"the cache holds {', '.join(_DTYPES)}; found {tensor.dtype}")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return shards.Item(_NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes(), source)


# ---- packed items ----

_PACKED = "|zlib-planes:"


def _packed(item: shards.Item) -> shards.Item:
    """An item as a U8 tensor of fewer bytes; itself where that saves nothing.

    The first bytes of all numbers, then the second ones, and so on, then zlib: signs and exponents repeat, the rest is
    noise. fp32 latents lose about a tenth, bf16 embeddings a quarter of their size.
    """
    width = _DTYPES[item.dtype].itemsize
    planes = np.frombuffer(item.data, np.uint8).reshape(-1, width).T.tobytes()
    data = zlib.compress(planes, level=1)
    if len(data) >= len(item.data):
        return item
    form = f"{_PACKED}{item.dtype}:{','.join(map(str, item.shape))}"
    return shards.Item("U8", (len(data),), data, item.source, form)


def _tensor(data: bytearray, location: shards.Location) -> Tensor:
    """The tensor of an item's bytes, which are what was written."""
    dtype, shape = location.dtype, location.shape
    if location.form:
        dtype, _, sides = location.form.removeprefix(_PACKED).partition(":")
        shape = tuple(int(side) for side in sides.split(",") if side)
        planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(_DTYPES[dtype].itemsize, -1)
        data = bytearray(planes.T.tobytes())
    if not data:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)
