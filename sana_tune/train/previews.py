"""Pictures of half-finished samples: decoded on the device, packed aside, told in order as events."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.prompts import preview_steps
from sana_tune.train.validate import FAILURES, Picture, first_line
from sana_tune.watch.events import Previewed

if TYPE_CHECKING:
    import numpy as np


class Previews:
    """Shows each `every`-th step of a sampler, and its last.

    decode: scaled latents [1, C, h, w] → uint8 [H, W, 3], both on the device. encode: pixels → bytes of a PNG file.
    emit: takes the events, on the thread that draws. release: gives the device's memory back.
    A preview that fails ends the previews, with one warning; the picture goes on.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[np.ndarray], bytes],
        emit: Callable[[Previewed], None],
        every: int,
        release: Callable[[], None] = lambda: None,
    ):
        self.decode, self.encode, self.emit, self.every, self.release = decode, encode, emit, every, release
        self.broken = False

    def of(self, picture: Picture, progress: Progress) -> Showing:
        """What shows the steps of one picture; `close()` it."""
        return Showing(self, picture, progress)


class Showing:
    """Called after each step of a sampler. The device is not waited for: a thread copies and packs what it made."""

    def __init__(self, previews: Previews, picture: Picture, progress: Progress):
        self._previews, self._picture, self._progress = previews, picture, progress
        self._due = preview_steps(picture.steps, previews.every)
        self._worker = ThreadPoolExecutor(1, "previews")
        self._packed: list[tuple[int, Future[bytes]]] = []

    def __call__(self, step: int, estimate: Callable[[], Tensor]) -> None:
        """After step `step` (from 1). estimate: gives the latents of the picture that the step points to."""
        if step in self._due and not self._previews.broken:
            try:
                pixels = self._previews.decode(estimate())
            except FAILURES as error:
                self._break(error)
            else:
                self._packed.append((step, self._worker.submit(self._pack, pixels)))
        self._tell(wait=False)

    def close(self) -> None:
        """Tell those that are left, and end the thread."""
        self._tell(wait=True)
        self._worker.shutdown()

    def _pack(self, pixels: Any) -> bytes:
        return self._previews.encode(pixels.cpu().numpy())

    def _tell(self, *, wait: bool) -> None:
        """Emit what is packed, in the order of the steps."""
        while self._packed and (wait or self._packed[0][1].done()):
            step, packed = self._packed.pop(0)
            try:
                data = packed.result()
            except FAILURES as error:
                self._break(error)
                continue
            picture = self._picture
            self._previews.emit(Previewed(self._progress, picture.slug, step, picture.steps, data))

    def _break(self, error: Exception) -> None:
        if not self._previews.broken:
            what = "a preview failed, and there will be none any more; pictures are drawn as before: %s: %s"
            log.warning(what, type(error).__name__, first_line(error))
        self._previews.broken = True
