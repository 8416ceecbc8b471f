"""Filling the caches: what is missing is encoded, by functions that come from outside, and committed as it goes.

Data never learns what a VAE or a text encoder is: `encode` takes final captions or pictures and gives tensors.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
from torch import Tensor

from sana_tune.data.cache import TensorCache
from sana_tune.data.images import BrokenImage, prepare
from sana_tune.data.records import Keys, Record, content_hash
from sana_tune.errors import UserError

# done, total: items made so far and to be made in all.
Report = Callable[[int, int], None]
Item = TypeVar("Item")

_WORKERS = min(8, os.cpu_count() or 1)
_BATCHES_AHEAD = 4  # batches decoded and resized while the encoder works


def fill_text(
    cache: TensorCache,
    captions: Mapping[str, str],
    encode: Callable[[list[str]], list[Tensor]],
    batch_size: int,
    report: Report,
) -> int:
    """Encode the captions (key → final text) that the cache has not. Answers how many were made."""
    missing = cache.missing(captions)
    done = 0
    with cache.writer() as writer:
        for keys in chunks(missing, batch_size):
            for key, tensor in zip(keys, encode([captions[key] for key in keys]), strict=True):
                writer.add(key, tensor)
            done += len(keys)
            report(done, len(missing))
    return done


def fill_latents(
    records: Sequence[Record],
    cache: TensorCache,
    keys: Keys,
    read: Callable[[Record], bytes],
    encode: Callable[[np.ndarray], list[Tensor | None]],
    batch_size: int,
    report: Report,
) -> dict[str, str]:
    """Encode the pictures of `records` that the cache has not, equal ones once, in batches of one size.

    read: the bytes of a picture, or UserError.
    encode: uint8 pictures [B, H, W, 3] → B latents, None for one that is not finite.
    Answers the pictures that could not be encoded: `Record.id` → reason.
    """
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(keys.latent(record), []).append(record)
    todo = sorted(cache.missing(by_key), key=lambda key: by_key[key][0].placement.target)  # stable: one size together
    broken: dict[str, str] = {}
    done = 0
    with cache.writer() as writer:
        for batch in _prepared([(key, by_key[key][0]) for key in todo], read, batch_size):
            sound = [(key, picture) for key, picture in batch if not isinstance(picture, str)]
            reasons = {key: picture for key, picture in batch if isinstance(picture, str)}
            for (key, _), latent in zip(sound, _encoded(sound, encode), strict=True):
                if latent is None:
                    reasons[key] = "its latent is not finite"
                else:
                    writer.add(key, latent)
            broken |= {record.id: reason for key, reason in reasons.items() for record in by_key[key]}
            done += len(batch)
            report(done, len(todo))
    return broken


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive lists of up to `size` items."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _encoded(
    sound: Sequence[tuple[str, np.ndarray]], encode: Callable[[np.ndarray], list[Tensor | None]]
) -> list[Tensor | None]:
    """One encoder call, or none when every picture of the batch is broken."""
    return encode(np.stack([picture for _, picture in sound])) if sound else []


def _prepared(
    todo: Sequence[tuple[str, Record]], read: Callable[[Record], bytes], batch_size: int
) -> Iterator[list[tuple[str, np.ndarray | str]]]:
    """Batches of one size, decoded and resized by threads a few batches ahead; a broken one is its reason."""

    def work(key: str, record: Record) -> tuple[str, np.ndarray | str]:
        try:
            data = read(record)
            if content_hash(data) != record.content_hash:
                return key, "was changed after the run had looked at it; start again"
            return key, prepare(data, record.placement)
        except BrokenImage as error:
            return key, error.reason
        except UserError as error:
            return key, error.problems[0].what

    waiting: deque[list[Future]] = deque()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="pictures") as workers:
        try:
            for group in _of_one_size(todo, batch_size):
                waiting.append([workers.submit(work, key, record) for key, record in group])
                if len(waiting) > _BATCHES_AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            workers.shutdown(wait=True, cancel_futures=True)


def _of_one_size(todo: Sequence[tuple[str, Record]], batch_size: int) -> Iterator[list[tuple[str, Record]]]:
    """Consecutive pictures of one target size, up to batch_size of them."""
    group: list[tuple[str, Record]] = []
    for item in todo:
        full = len(group) == batch_size
        if group and (full or group[0][1].placement.target != item[1].placement.target):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
