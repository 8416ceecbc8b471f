"""Memory that runs out: known by its many errors, and told in one message instead of a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sana_tune.errors import Problem, UserError
from sana_tune.log import log

# How an allocation that failed begins, or what stands in it: of torch on a CPU, CUDA and the libraries on it.
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was no memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@dataclass(frozen=True)
class InUse:
    """Bytes of a GPU when its memory ran out: all there is, the most that torch had, what other programs have."""

    total_bytes: int
    peak_bytes: int
    others_bytes: int


def in_use(device: torch.device) -> InUse | None:
    """What is in use on a GPU; None elsewhere, where nobody counts it."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return InUse(total, torch.cuda.max_memory_allocated(device), max(0, others))


@contextmanager
def told(problem: Callable[[str], Problem]) -> Iterator[None]:
    """Raises UserError where memory runs out in here. problem: the first sentence of the error → what to tell."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        log.debug("memory ran out", exc_info=error)
        raise UserError(problem(_sentence(error))) from None


def _sentence(error: BaseException) -> str:
    """What the error says first: the size that was asked for stands there. CUDA's go on for pages."""
    first = str(error).strip().partition("\n")[0]
    asked = first.find("ried to allocate")
    if asked >= 0:
        return "t" + first[asked:].split(". ")[0].rstrip(".")
    return first[:200] or type(error).__name__
