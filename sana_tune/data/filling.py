"""Filling the caches: what is missing is encoded, by functions that come from outside, and committed as it goes.

Data never learns what a VAE or a text encoder is: `encode` takes final captions or pictures and gives tensors.
Several processes may fill one cache at once: each looks what the others committed before it encodes a batch, and
begins at a place of its own.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from sana_tune.data.cache import TensorCache, Writer
from sana_tune.data.images import BrokenImage, prepare
from sana_tune.data.notes import latent_note, text_note
from sana_tune.data.records import Keys, Record, content_hash
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.store import StoreLost

# done, total: items made so far and to be made in all; first of all with 0.
Report = Callable[[int, int], None]
Item = TypeVar("Item")
Made = TypeVar("Made")

_WORKERS = min(8, os.cpu_count() or 1)
_BATCHES_AHEAD = 4  # batches decoded and resized while the encoder works


class Halving(Generic[Made]):
    """An encoder whose batches get smaller when the device has no room for them; that is said once.

    items: what it encodes, in words ("pictures"). relieve: hands memory back to the device after a failure.
    """

    def __init__(self, encode: Callable[[Any], Sequence[Made]], items: str, relieve: Callable[[], None] = lambda: None):
        self._encode = encode
        self._items = items
        self._relieve = relieve
        self._most: int | None = None

    def __call__(self, batch: list[str] | np.ndarray) -> list[Made]:
        """What `encode` makes of a batch, in order. UserError when not even one item fits."""
        made: list[Made] = []
        while len(made) < len(batch):
            size = len(batch) - len(made)
            size = size if self._most is None else min(size, self._most)
            try:
                made += self._encode(batch[len(made) : len(made) + size])
                continue
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise self._too_large(batch) from error
            self._relieve()  # out of the handler, which holds what the failed attempt had made
            if self._most is None:
                text = "%d %s at once do not fit into the device's memory: going on with half as many"
                log.warning(text, size, self._items)
            self._most = max(1, size // 2)
        return made

    def _too_large(self, batch: list[str] | np.ndarray) -> UserError:
        size = f" of {batch.shape[2]}x{batch.shape[1]} px" if isinstance(batch, np.ndarray) else ""
        what = f"there is no room in the device's memory to encode {self._items}{size}, not even one at a time"
        fix = "close other programs that use the device, use smaller pictures, or fill the caches with --device cpu"
        return UserError(Problem("caching", what, f"{fix}; what was encoded so far is kept"))


def fill_text(
    cache: TensorCache,
    captions: Mapping[str, str],
    encode: Callable[[list[str]], list[Tensor]],
    batch_size: int,
    report: Report,
    encoder: str = "",
) -> int:
    """Encode the captions (key → final text) that the cache has not. Answers how many were made.

    encoder: who encodes, for the notes that go with the items.
    """
    missing = cache.missing(captions)
    done = made = 0
    if not missing:
        return 0
    report(0, len(missing))
    with cache.writer() as writer:
        for chunk in _shared_out(list(chunks(missing, batch_size)), writer):
            keys = _still_missing(cache, chunk)
            for key, tensor in zip(keys, encode([captions[key] for key in keys]) if keys else (), strict=True):
                writer.add(key, tensor, text_note(captions[key], encoder))
            done, made = done + len(chunk), made + len(keys)
            report(done, len(missing))
    return made


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
    if not todo:
        return {}
    report(0, len(todo))
    with cache.writer() as writer:
        groups = _shared_out(list(_of_one_size([(key, by_key[key][0]) for key in todo], batch_size)), writer)
        for batch in _prepared(groups, read):
            wanted = set(_still_missing(cache, [key for key, _ in batch]))
            sound = [(key, picture) for key, picture in batch if not isinstance(picture, str) and key in wanted]
            reasons = {key: picture for key, picture in batch if isinstance(picture, str)}
            for (key, _), latent in zip(sound, _encoded(sound, encode), strict=True):
                if latent is None:
                    reasons[key] = "its latent is not finite"
                else:
                    writer.add(key, latent, latent_note(by_key[key][0], keys))
            broken |= {record.id: reason for key, reason in reasons.items() for record in by_key[key]}
            done += len(batch)
            report(done, len(todo))
    return broken


def undecodable(
    records: Sequence[Record], read: Callable[[Record], bytes], report: Report
) -> tuple[dict[str, str], list[Record]]:
    """Decode pictures and keep nothing: those that cannot be (`Record.id` → reason), and the sound ones."""
    broken: dict[str, str] = {}
    sound: list[Record] = []
    groups = chunks(((record.id, record) for record in records), _WORKERS)
    for batch, group in zip(_prepared(groups, read), chunks(records, _WORKERS), strict=True):
        for (name, picture), record in zip(batch, group, strict=True):
            if isinstance(picture, str):
                broken[name] = picture
            else:
                sound.append(record)
        report(len(broken) + len(sound), len(records))
    return broken, sound


def one_latent(
    record: Record,
    read: Callable[[Record], bytes],
    encode: Callable[[np.ndarray], list[Tensor | None]],
) -> Tensor:
    """The latent of one picture, now. UserError when it cannot be made."""
    picture = _picture(record, read)
    latent = None if isinstance(picture, str) else encode(picture[None])[0]
    if latent is None:
        what = picture if isinstance(picture, str) else "its latent is not finite"
        fix = (
            "start again: it is left out then; with the cache on (`sana_tune cache warm`) that is found before training"
        )
        raise UserError(Problem(record.id, f"this picture cannot be encoded: {what}", fix))
    return latent


def _shared_out(batches: list[Item], writer: Writer) -> list[Item]:
    """The batches in the order in which they are made: beside other processes in an order of one's own."""
    if not writer.alone:
        random.Random(os.urandom(8)).shuffle(batches)
    return batches


def _still_missing(cache: TensorCache, keys: Sequence[str]) -> list[str]:
    """Those that no other process committed since."""
    cache.refresh()
    return cache.missing(keys)


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
    groups: Iterable[list[tuple[str, Record]]], read: Callable[[Record], bytes]
) -> Iterator[list[tuple[str, np.ndarray | str]]]:
    """Batches of one size, decoded and resized by threads a few batches ahead; a broken one is its reason."""
    waiting: deque[list[tuple[str, Future[Any]]]] = deque()

    def first() -> list[tuple[str, np.ndarray | str]]:
        return [(key, future.result()) for key, future in waiting.popleft()]

    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="pictures") as workers:
        try:
            for group in groups:
                waiting.append([(key, workers.submit(_picture, record, read)) for key, record in group])
                if len(waiting) > _BATCHES_AHEAD:
                    yield first()
            while waiting:
                yield first()
        finally:
            workers.shutdown(wait=True, cancel_futures=True)


def _picture(record: Record, read: Callable[[Record], bytes]) -> np.ndarray | str:
    """A training picture [H, W, 3] uint8, or why there is none."""
    try:
        data = read(record)
        if content_hash(data) != record.content_hash:
            return "was changed after the run had looked at it; start again"
        return prepare(data, record.placement, record.ground)
    except BrokenImage as error:
        return error.reason
    except StoreLost:
        raise
    except UserError as error:
        return error.problems[0].what


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
