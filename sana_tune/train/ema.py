"""The exponential moving average of the weights, in fp32, and the null object that stands in for none.

It lives beside the weights, or in main memory: then the weights are copied aside while the next step computes, and
averaged by a thread. A step waits only where the average before is not done yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from sana_tune.train.sharding import local, put

Place = Literal["accelerator", "cpu"]
Shown = Literal["comparison", "ema_only", "none"]


def ramped(decay: float, step: int) -> float:
    """The decay of one step: min(decay, (1 + s) / (10 + s)), s = optimizer steps done (contracts §3)."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """A moving average of named parameters, updated every `interval` steps with the decay compensated.

    named_parameters: `model.named_parameters()` of the bare (unwrapped) model.
    warmup: optimizer steps through which the average is the weights themselves, then the decay is `decay`; 0 = the
    decay is ramped instead. place: where the average is kept. shown: which weights previews are drawn with.
    The average starts as the weights.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        decay: float,
        interval: int = 1,
        *,
        warmup: int = 0,
        place: Place = "accelerator",
        shown: Shown = "comparison",
    ):
        pairs = list(named_parameters)
        self.decay = decay
        self.interval = interval
        self.warmup = warmup
        self.shown: Shown = shown
        self._names = [name for name, _ in pairs]
        self._weights: list[Tensor] = [parameter for _, parameter in pairs]
        self._same_dtype = all(parameter.dtype == torch.float32 for parameter in self._weights)
        self._copies = Copies(self._weights) if place == "cpu" else None
        self._is_split = any(local(parameter) is not parameter for parameter in self._weights)
        device = "cpu" if place == "cpu" else None
        self._shadow = [parameter.detach().to(device, torch.float32, copy=True) for parameter in self._weights]

    @property
    def is_aside(self) -> bool:
        """Whether the average is kept in main memory."""
        return self._copies is not None

    def share(self, step: int) -> float:
        """How far optimizer step number `step` (1 = the first) moves the average to the weights: 0 = not at all."""
        if step == self.warmup or (step < self.warmup and step % self.interval == 0):
            return 1.0
        if step % self.interval:
            return 0.0
        return 1.0 - (self.decay if self.warmup else ramped(self.decay, step)) ** self.interval

    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step number `step` (1 = the first)."""
        share = self.share(step)
        if not share:
            return
        if self._copies is None:
            self._move(self._weights, share)
        else:
            self._copies.take(lambda copies: self._move(copies, share))

    @torch.no_grad()
    def _move(self, weights: list[Tensor], share: float) -> None:
        if self._same_dtype:
            torch._foreach_lerp_(self._shadow, weights, share)
        else:
            torch._foreach_mul_(self._shadow, 1.0 - share)
            torch._foreach_add_(self._shadow, weights, alpha=share)

    def fence(self) -> None:
        """To be called before the weights move: the device, not the host, waits until they are copied aside."""
        if self._copies is not None:
            self._copies.fence()

    def _settle(self) -> None:
        """Wait until the average is what `update` asked for last."""
        if self._copies is not None:
            self._copies.settle()

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the weights as they are."""
        self._settle()
        torch._foreach_copy_(list(map(local, self._shadow)), list(map(local, self._weights)))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """In here the model holds the averaged weights (in its own dtype); its own are put back in any case.

        Only pointers are exchanged when the average is fp32 on the same device as the weights, so no memory is taken;
        else a second set of weights is on the device.
        """
        self._settle()
        if self._is_split:
            with self._swapped_in_place():
                yield
            return
        own = [parameter.data for parameter in self._weights]
        try:
            for parameter, average in zip(self._weights, self._shadow, strict=True):
                parameter.data = average.to(parameter.device, parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._weights, own, strict=True):
                parameter.data = data

    @contextmanager
    def _swapped_in_place(self) -> Iterator[None]:
        """`swapped` for weights that are split over processes: FSDP2 gathers them from where they have always been."""
        weights, averages = list(map(local, self._weights)), list(map(local, self._shadow))
        own = [weight.clone() for weight in weights]
        try:
            torch._foreach_copy_(weights, averages)
            yield
        finally:
            torch._foreach_copy_(weights, own)

    def views(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """(suffix, context) for each set of weights that is shown: the raw ones, then the average."""
        if self.shown != "ema_only":
            yield "", nullcontext()
        if self.shown != "none":
            yield "_ema", self.swapped()

    def state_dict(self) -> dict[str, Tensor]:
        """Name → averaged fp32 weight (not copies)."""
        self._settle()
        return dict(zip(self._names, self._shadow, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises KeyError when a name is missing."""
        self._settle()
        for name, average in zip(self._names, self._shadow, strict=True):
            put(average, state[name])


class Copies:
    """Copies of tensors in main memory that are made, and used by a thread, while the device goes on.

    On a GPU they are pinned and filled by a stream of their own; elsewhere filling them is an ordinary copy.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = list(tensors)
        self._on_gpu = self._tensors[0].is_cuda
        self._held = [torch.empty_like(each, device="cpu", pin_memory=self._on_gpu) for each in self._tensors]
        self._stream = torch.cuda.Stream(self._tensors[0].device) if self._on_gpu else None
        self._filled: torch.cuda.Event | None = None
        self._worker = ThreadPoolExecutor(1, "ema")
        self._job: Future[None] | None = None

    @torch.no_grad()
    def take(self, use: Callable[[list[Tensor]], None]) -> None:
        """Copy the tensors as they are now, and call `use` with the copies in the thread. Waits for the call before.

        On a GPU the tensors must not change before `fence`.
        """
        self.settle()
        if self._stream is None:
            torch._foreach_copy_(self._held, self._tensors)
        else:
            self._fill(self._stream)
        self._job = self._worker.submit(self._use, use, self._filled)

    def _fill(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for held, tensor in zip(self._held, self._tensors, strict=True):
                held.copy_(tensor, non_blocking=True)
            self._filled = torch.cuda.Event()
            self._filled.record(stream)

    def _use(self, use: Callable[[list[Tensor]], None], filled: torch.cuda.Event | None) -> None:
        if filled is not None:
            filled.synchronize()
        use(self._held)

    def fence(self) -> None:
        """From here on the tensors may change: what the device does next waits until they are copied."""
        if self._filled is not None:
            torch.cuda.current_stream(self._tensors[0].device).wait_event(self._filled)

    def settle(self) -> None:
        """Wait for the thread; what failed in it is raised here."""
        if self._job is not None:
            job, self._job = self._job, None
            job.result()


class NoEma:
    """Stands where no average is kept."""

    def update(self, step: int) -> None:
        pass

    def fence(self) -> None:
        pass

    def reset(self) -> None:
        pass

    @contextmanager
    def swapped(self) -> Iterator[None]:
        yield

    def views(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        yield "", nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
