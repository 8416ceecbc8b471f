"""Positions → batches: order, captions and dropout from the position alone, tensors from the caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sana_tune.data.batch import Batch
from sana_tune.data.cache import Tensors
from sana_tune.data.order import MicroBatch, Order
from sana_tune.data.position import unit_float
from sana_tune.data.records import Keys, Record

Position = TypeVar("Position")
Loaded = TypeVar("Loaded")

# One optimizer step of one rank: its micro-batches in order, each with its tensors.
Step = list[tuple[MicroBatch, Batch]]


class Batches:
    """The batches of a run, step by step.

    order, records: which pictures when; records may depend on the epoch (data.redraw). latents, text: caches that hold
    every key `keys` names, that of the empty caption too when caption_dropout > 0. caption_dropout: share of samples
    that get the empty caption. masks: the mask [1, h, w] of a record that has one. segmentation_share: share of the
    samples with a segmentation mask in which it is applied; in the others every place counts.
    A step takes ranks × accumulation consecutive micro-batches; this rank takes each `ranks`-th, from `rank`
    on.
    prefetch: steps loaded ahead.
    """

    def __init__(
        self,
        order: Order,
        records: Sequence[Record] | Callable[[int], Sequence[Record]],
        latents: Tensors | Callable[[Record], Tensors],
        text: Tensors | Callable[[Record], Tensors],
        keys: Keys,
        *,
        seed: int,
        caption_dropout: float = 0.0,
        masks: Callable[[Record], Tensor] | None = None,
        segmentation_share: float = 1.0,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        prefetch: int = 4,
    ):
        self._order = order
        self._records = records
        self._latents = latents
        self._text = text
        self._keys = keys
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._masks = masks
        self._segmentation_share = segmentation_share
        self._rank = rank
        self._ranks = ranks
        self._accumulation = accumulation
        self._prefetch = prefetch

    def steps(self, first_step: int, total_steps: int) -> Iterator[Step]:
        """The steps first_step … total_steps − 1, prefetched; none when the run is finished.

        Closing the iterator ends its thread.
        """
        return prefetched(self.load, range(first_step, total_steps), self._prefetch)

    def load(self, step: int) -> Step:
        """One optimizer step, `step` counted from 0. Pure: it depends on nothing but the position."""
        loaded = []
        for turn in range(self._accumulation):
            micro = turn * self._ranks + self._rank
            micro_batch = self._order.micro_batch(step * self._ranks * self._accumulation + micro)
            loaded.append((micro_batch, self._batch(micro_batch, step, micro)))
        return loaded

    def _batch(self, micro_batch: MicroBatch, step: int, micro: int) -> Batch:
        shown = self._records(micro_batch.epoch) if callable(self._records) else self._records
        records = [shown[index] for index in micro_batch.records]
        captions = [self.caption(record, step, micro, sample) for sample, record in enumerate(records)]
        pairs = zip(records, captions, strict=True)
        text, mask = padded([self._text_of(record).get(self._keys.text(caption)) for record, caption in pairs])
        return Batch(
            latents=torch.stack([self._cache_of(record).get(self._keys.latent(record)) for record in records]),
            text=text,
            text_mask=mask,
            loss_mask=self._loss_mask(records, step, micro),
            role=records[0].role,
            ids=tuple(record.id for record in records),
            captions=tuple(captions),
        )

    def caption(self, record: Record, step: int, micro: int, sample: int) -> str:
        """The caption this sample is trained on; "" when it is dropped."""
        if drops_caption(self._seed, step, micro, sample, self._caption_dropout):
            return ""
        return record.captions[choose_caption(self._seed, step, micro, sample, len(record.captions))]

    def _loss_mask(self, records: Sequence[Record], step: int, micro: int) -> Tensor | None:
        """What counts of each picture, [B, 1, h, w]; None where all of all counts."""
        if self._masks is None or not any(record.mask_key for record in records):
            return None
        found = []
        for sample, record in enumerate(records):
            mask = self._masks(record)
            share = self._segmentation_share if record.mask_kind == "segmentation" else 1.0
            applied = applies_mask(self._seed, step, micro, sample, share)
            found.append(mask if applied else torch.ones_like(mask))
        return torch.stack(found)

    def _text_of(self, record: Record) -> Tensors:
        return self._text(record) if callable(self._text) else self._text

    def _cache_of(self, record: Record) -> Tensors:
        return self._latents(record) if callable(self._latents) else self._latents

    def epochs(self, step: int) -> tuple[int, int]:
        """The first and the last epoch, counted from 0, that a step has micro-batches of, on any rank."""
        each = self._ranks * self._accumulation
        return self._order.micro_batch(step * each).epoch, self._order.micro_batch((step + 1) * each - 1).epoch


def choose_caption(seed: int, step: int, micro: int, sample: int, variants: int) -> int:
    """Which caption variant a sample gets, 0 … variants−1, all equally likely.

    micro: number of the micro-batch within the step, over all ranks. sample: place within the micro-batch.
    """
    return int(unit_float(seed, "caption", step, micro, sample) * variants)


def drops_caption(seed: int, step: int, micro: int, sample: int, probability: float) -> bool:
    """Whether a sample is trained on the empty caption."""
    return unit_float(seed, "dropout", step, micro, sample) < probability


def applies_mask(seed: int, step: int, micro: int, sample: int, probability: float) -> bool:
    """Whether a sample's segmentation mask is applied."""
    return unit_float(seed, "mask", step, micro, sample) < probability


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings [T_i, D] as one tensor [B, T, D], padded with zeros, and its mask [B, T].

    mask: int64, 1 = a real token.
    """
    text = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(one) for one in texts])
    return text, (torch.arange(text.shape[1]) < lengths[:, None]).to(torch.int64)


def prefetched(load: Callable[[Position], Loaded], positions: Iterable[Position], ahead: int) -> Iterator[Loaded]:
    """load(position) for each position, in order, worked out by a thread up to `ahead` positions early.

    What load raises is raised here, at its place. Closing the iterator ends the thread.
    """
    waiting: deque[Future[Loaded]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        for position in positions:
            waiting.append(thread.submit(load, position))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
