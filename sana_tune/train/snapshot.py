"""The state of a run at one moment, in main memory: what is written while training goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sana_tune.config.lycoris import ADAPTER, WHOLE, Layout
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.train.sharding import gathered, is_sharded, is_split
from sana_tune.train.states import full_state, names_of

if TYPE_CHECKING:
    from sana_tune.train.step import Parts

PAGE_BYTES = 2**26
_ALIGNMENT = 64


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, as plain values and tensors by name.

    config: of the transformer, as diffusers stores it, or of the adapter. average: {} where none is kept. optimizer: as
    `states.full_state` gives it. layout: where they are kept.
    """

    progress: Progress
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    layout: Layout = WHOLE

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors; one that stands in several places counts once."""
        found = {id(tensor): tensor for part in (self.weights, self.average, self.optimizer) for tensor in _in(part)}
        return sum(tensor.nbytes for tensor in found.values())


class Memory:
    """Main memory for a snapshot, kept for the next one: fresh memory costs as much as the copying itself.

    pinned: a GPU copies into it at full speed.
    """

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self._pages: list[Tensor] = []
        self._page, self._used = 0, 0

    def reuse(self) -> None:
        """Begin again: what was taken before is overwritten."""
        self._page, self._used = 0, 0

    def take(self, like: Tensor) -> Tensor:
        """Memory for a tensor like this, strides too, with a storage of its own (torch.save writes whole ones)."""
        if like.numel() == 0:
            return torch.empty(like.shape, dtype=like.dtype)
        size = like.numel() * like.element_size()
        while self._page < len(self._pages) and self._used + size > self._pages[self._page].numel():
            self._page, self._used = self._page + 1, 0
        if self._page == len(self._pages):
            self._pages.append(self._new(max(size, PAGE_BYTES)))
        piece = self._pages[self._page].numpy()[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        strides = like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()
        return torch.from_numpy(piece).view(like.dtype).as_strided(like.shape, strides)

    def _new(self, size: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                log.warning("no more memory can be pinned, so checkpoints are copied more slowly: %s", error)
                self.pinned = False
        return torch.empty(size, dtype=torch.uint8)


def snapshot(parts: Parts, progress: Progress) -> Snapshot:
    """The state right now: plain values, and the live tensors themselves. The one place that knows where it lives.

    Collective where the model is split over processes: then the tensors are copies in the main process's memory, whole.
    """
    bare = parts.bare
    # diffusers notes where the model came from: a path of this machine, which is nobody's business and differs by user
    config = {key: value for key, value in json.loads(bare.to_json_string()).items() if key != "_name_or_path"}
    if parts.adapter is not None:
        config = parts.adapter.file.to_json()
    optimizer = full_state(parts.optimizer, names_of(bare.named_parameters()))
    live = (parts.kept(), parts.kept_average(), optimizer)
    layout = WHOLE if parts.adapter is None else ADAPTER
    if is_sharded(bare):  # what is not split (counts of steps) is copied too, so that all of it stays as it is now
        live = gathered(_replaced(live, lambda each: each if is_split(each) else each.detach().clone()))
    weights, average, states = live
    return Snapshot(progress, config, weights, average, states, layout)


def copied(live: Snapshot, memory: Memory) -> tuple[Snapshot, Callable[[], None]]:
    """A snapshot in main memory, and what fills it: to be called by any thread, before a live tensor changes."""
    memory.reuse()
    places: dict[int, Tensor] = {}  # a tensor that stands in several places is one there too
    sources: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        if id(tensor) not in places:
            places[id(tensor)] = memory.take(tensor)
            sources.append(tensor.detach())
        return places[id(tensor)]

    weights, average, states = (_replaced(part, place) for part in (live.weights, live.average, live.optimizer))
    made = Snapshot(live.progress, live.config, weights, average, states, live.layout)
    return made, _filling(sources, list(places.values()))


def _filling(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Callable[[], None]:
    """What copies the tensors. On a GPU that is done by a stream of its own, after what was asked of it before."""
    devices = {tensor.device for tensor in sources if tensor.is_cuda}
    ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    @torch.no_grad()
    def fill() -> None:
        streams = {device: torch.cuda.Stream(device) for device in devices}
        for device, stream in streams.items():
            stream.wait_event(ready[device])
            with torch.cuda.stream(stream):
                for source, target in zip(sources, targets, strict=True):
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
        for source, target in zip(sources, targets, strict=True):
            if not source.is_cuda:
                _copy(source, target)
        for stream in streams.values():
            stream.synchronize()

    return fill


def _copy(source: Tensor, target: Tensor) -> None:
    """From main memory by the calling thread alone: torch's own team would have those that train wait for it."""
    if source.device.type == "cpu" and source.is_contiguous() and target.is_contiguous():
        np.copyto(_bytes(target), _bytes(source))
    else:
        target.copy_(source)


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.view(-1).view(torch.uint8).numpy()


def _replaced(value: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """The same values with other tensors."""
    if isinstance(value, Tensor):
        return place(value)
    if isinstance(value, Mapping):
        return {key: _replaced(each, place) for key, each in value.items()}
    if isinstance(value, list) or any(True for _ in _in(value)):
        return type(value)(_replaced(each, place) for each in value)
    return value


def _in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _in(each)
