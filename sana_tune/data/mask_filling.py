"""Filling the caches with masks: each on the grid of its picture's latent, kept beside it under a key of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from sana_tune.data.cache import TensorCache
from sana_tune.data.images import BrokenImage, mask_grid
from sana_tune.data.notes import mask_note
from sana_tune.data.records import Keys, Record, content_hash
from sana_tune.errors import Problem, UserError
from sana_tune.log import log

Report = Callable[[int, int], None]
Read = Callable[[Record], bytes]

_WORKERS = min(8, os.cpu_count() or 1)
_AT_ONCE = 64
_NAMES_SHOWN = 5


class Masks:
    """The masks of a run, by record: from the cache of the record's dataset, else made on the spot.

    The latter are those of crops that are drawn anew in each epoch. caches, reads: by dataset. factor: pixels per place
    of the latent.
    """

    def __init__(self, caches: Mapping[str, TensorCache], reads: Mapping[str, Read], keys: Keys, factor: int):
        self._caches, self._reads, self._keys, self._factor = caches, reads, keys, factor

    def of(self, record: Record) -> Tensor:
        """The mask [1, h, w] of a record that has one, fp32, 0 to 1. UserError when it cannot be read any more."""
        cache, key = self._caches[record.dataset], self._keys.mask(record)
        if key in cache:
            return cache.get(key)
        mask = _made(record, self._reads[record.dataset], self._factor)
        if isinstance(mask, str):
            raise UserError(Problem(record.id, mask, "restore it, or start again to train without this picture"))
        return mask


def fill_masks(
    records: Sequence[Record],
    cache: TensorCache | None,
    keys: Keys,
    read: Read,
    factor: int,
    report: Report,
) -> dict[str, str]:
    """Make the masks of `records` that the cache has not; records without a mask are passed over.

    cache: None = they are not kept, and made to see that they can be. read: the bytes of a record's mask, or UserError.
    factor: pixels per place of the latent. Answers the records whose mask cannot be read: `Record.id` → reason. Masks
    that are black all over are told: nothing of such a picture counts.
    """
    by_key: dict[str, list[Record]] = {}
    for record in records:
        if record.mask_key is not None:
            by_key.setdefault(keys.mask(record), []).append(record)
    todo = list(by_key) if cache is None else cache.missing(by_key)
    if not todo:
        return {}
    broken: dict[str, str] = {}
    black: list[str] = []

    def made(key: str) -> Tensor | str:
        return _made(by_key[key][0], read, factor)

    with (
        nullcontext() if cache is None else cache.writer() as writer,
        ThreadPoolExecutor(_WORKERS, thread_name_prefix="masks") as workers,
    ):
        for begin in range(0, len(todo), _AT_ONCE):
            chunk = todo[begin : begin + _AT_ONCE]
            for key, mask in zip(chunk, workers.map(made, chunk), strict=True):
                names = [record.id for record in by_key[key]]
                if isinstance(mask, str):
                    broken |= dict.fromkeys(names, mask)
                    continue
                if writer is not None:
                    writer.add(key, mask, mask_note(by_key[key][0], keys))
                black += names if not mask.any() else []
            report(begin + len(chunk), len(todo))
    if black:
        more = f" and {len(black) - _NAMES_SHOWN} more" if len(black) > _NAMES_SHOWN else ""
        shown = ", ".join(black[:_NAMES_SHOWN])
        log.warning(
            "the masks of %d pictures are black where they are trained: nothing counts: %s%s", len(black), shown, more
        )
    return broken


def _made(record: Record, read: Read, factor: int) -> Tensor | str:
    """The mask [1, h, w] of a picture, fp32, or why there is none."""
    name = f"its mask {record.mask_key}"
    try:
        data = read(record)
        if content_hash(data) != record.mask_hash:
            return f"{name} was changed after the run had looked at it; start again"
        return torch.from_numpy(mask_grid(data, record.placement, record.mask_kind, factor))[None]
    except BrokenImage as error:
        return f"{name} {error.reason}"
    except UserError as error:
        return f"{name}: {error.problems[0].what}"
