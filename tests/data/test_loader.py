from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sana_tune.data.buckets import Bucket
from sana_tune.data.cache import TensorCache
from sana_tune.data.geometry import Size
from sana_tune.data.loader import Batches, choose_caption, drops_caption, padded, prefetched
from sana_tune.data.order import Order
from sana_tune.data.records import Keys, Record, Role
from sana_tune.data.timeline import Window
from tests.data.pictures import record

KEYS = Keys("vae", "gemma")
SIZES = (Size(64, 64), Size(96, 64))


def number(latents: torch.Tensor) -> list[int]:
    """The pictures of a batch, read off their latents."""
    return latents[:, 0, 0, 0].to(torch.int64).tolist()


@pytest.fixture
def records() -> list[Record]:
    return [
        record(f"{i}.png", SIZES[i % 2], captions=tuple(f"cat {i} {v}" for v in range(1 + i % 3))) for i in range(9)
    ]


@pytest.fixture
def make(tmp_path: Path, records: list[Record]):
    """Batches over both buckets, caches filled: picture i's latent is i everywhere, its captions have 1 + i tokens."""
    latents, text = TensorCache(tmp_path / "latents"), TensorCache(tmp_path / "text")
    latents.fill((KEYS.latent(r), torch.full((4, r.height_px // 8, r.width_px // 8), i)) for i, r in enumerate(records))
    captions = {caption: 1 + i for i, r in enumerate(records) for caption in r.captions}
    text.fill((KEYS.text(c), torch.full((n, 6), n).to(torch.bfloat16)) for c, n in {**captions, "": 2}.items())
    buckets = [Bucket("cats", size, tuple(range(i, 9, 2)), batch_size=2) for i, size in enumerate(SIZES)]
    order = Order(buckets, {}, "auto-weighting", seed=1)
    return lambda **settings: Batches(order, records, latents, text, KEYS, **{"seed": 1, **settings})


def summary(step) -> list:
    return [(m.index, b.ids, number(b.latents), b.text_mask.sum(1).tolist()) for m, b in step]


def test_batches_hold_what_their_records_say(make, records: list[Record]):
    for step in make(prefetch=2).steps(0, 10):
        ((micro_batch, batch),) = step
        chosen = [records[index] for index in micro_batch.records]
        assert batch.ids == tuple(r.id for r in chosen)
        assert number(batch.latents) == list(micro_batch.records)
        assert batch.latents.shape == (2, 4, chosen[0].height_px // 8, chosen[0].width_px // 8)
        assert batch.latents.dtype == torch.float32 or batch.latents.dtype == torch.int64
        assert batch.text.dtype == torch.bfloat16 and batch.text_mask.dtype == torch.int64
        lengths = [1 + index for index in micro_batch.records]
        assert batch.text_mask.sum(1).tolist() == lengths and batch.text.shape == (2, max(lengths), 6)
        assert batch.loss_mask is None and batch.role == chosen[0].role


def test_the_first_samples_are_those_that_are_trained_first(make):
    batches = make(accumulation=2, caption_dropout=0.5)
    trained = [ids for step in batches.steps(0, 3) for _, batch in step for ids in batch.ids]
    found = list(batches.first(8, 3))
    assert [record.id for record, _, _ in found] == trained[:8] and all(mask is None for *_, mask in found)
    assert "" in {caption for _, caption, _ in found}
    assert all(caption == "" or caption in record.captions for record, caption, _ in found)
    assert len(list(batches.first(99, 3))) == 12 and list(batches.first(0, 3)) == [] == list(batches.first(9, 0))


def test_any_start_continues_the_same_stream(make):
    straight = [summary(step) for step in make(accumulation=2, caption_dropout=0.5).steps(0, 12)]
    for start in (0, 1, 7, 12):
        resumed = [summary(step) for step in make(accumulation=2, caption_dropout=0.5, prefetch=1).steps(start, 12)]
        assert resumed == straight[start:]
    assert list(make().steps(5, 5)) == [] == list(make().steps(6, 5))


def test_ranks_and_accumulation_share_one_stream(make):
    """R ranks × A accumulation see what one rank with accumulation R·A sees, dropout and captions included."""
    alone = [summary(step) for step in make(accumulation=6, caption_dropout=0.3).steps(0, 4)]
    ranks = [
        [summary(step) for step in make(accumulation=3, rank=rank, ranks=2, caption_dropout=0.3).steps(0, 4)]
        for rank in (0, 1)
    ]
    for step, whole in enumerate(alone):
        assert whole[0::2] == ranks[0][step] and whole[1::2] == ranks[1][step]


def test_an_epoch_trains_every_picture(make):
    steps = list(make(accumulation=2).steps(0, 3))  # 5 micro-batches an epoch: the third step straddles its end
    first_epoch = [n for step in steps for m, b in step if m.epoch == 0 for n in number(b.latents)]
    assert set(first_epoch) == set(range(9)) and len(first_epoch) == 10
    assert [m.epoch for m, _ in steps[2]] == [0, 1]


def test_dropped_captions_are_the_empty_one(make):
    for _, batch in (pair for step in make(caption_dropout=1.0).steps(0, 5) for pair in step):
        assert batch.text_mask.tolist() == [[1, 1]] * 2


def test_a_variant_is_drawn_per_visit(make, records: list[Record]):
    batches = make()
    drawn = Counter(batches.caption(records[2], step, 0, 0) for step in range(300))
    assert set(drawn) == set(records[2].captions) and min(drawn.values()) > 70


def test_choices_depend_on_every_part_of_the_position():
    places = [
        (seed, step, micro, sample) for seed in (1, 2) for step in (1, 2) for micro in (1, 2) for sample in (1, 2)
    ]
    assert len({choose_caption(*place, 10**9) for place in places}) == 16
    halves = [[drops_caption(*place, probability=p / 64) for p in range(65)] for place in places]
    assert len({tuple(half) for half in halves}) > 10  # where each place's number lies, to 1/64
    dropped = [drops_caption(0, step, 0, 0, 0.1) for step in range(3000)]
    assert 230 < sum(dropped) < 370
    assert not any(drops_caption(0, step, 0, 0, 0.0) for step in range(1000))
    assert all(drops_caption(0, step, 0, 0, 1.0) for step in range(1000))


def test_padding_is_zero_and_masked():
    text, mask = padded([torch.ones(2, 3), torch.full((4, 3), 2.0)])
    assert text[0].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


# ---- any run: datasets, ranks, where it goes on ----


@dataclass(frozen=True)
class Held:
    """Tensors in main memory: the number that the key names, or a caption's length, everywhere."""

    of: Mapping[str, Tensor]

    def get(self, key: str) -> Tensor:
        return self.of[key]


@st.composite
def runs(draw) -> tuple[list[Record], Order, Held, Held]:
    """One to three datasets of one to three buckets, some of which start and end, with captions of some variants."""
    records: list[Record] = []
    buckets: list[Bucket] = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        batch_size, repeats = draw(st.integers(1, 4)), draw(st.integers(0, 2))
        role = draw(st.sampled_from([Role.TRAIN, Role.REGULARISE]))
        for number in range(draw(st.integers(1, 3))):
            size, first = Size(64 * (number + 1), 64), len(records)
            for _ in range(draw(st.integers(1, 6))):
                captions = tuple(f"{len(records)} {variant}" for variant in range(draw(st.integers(1, 3))))
                made = record(f"{len(records)}.png", size, name, captions)
                records.append(replace(made, role=role))
            buckets.append(Bucket(name, size, tuple(range(first, len(records))), batch_size, repeats, role))
    when = {"b": Window(start_step=draw(st.integers(0, 4))), "c": Window(1, 0, 2, None)}
    order = Order(
        buckets, {"a": 0.5}, draw(st.sampled_from(["auto-weighting", "uniform"])), draw(st.integers(0, 99)), when, 12
    )
    latents = Held({KEYS.latent(each): torch.full((1, 1, 1), number) for number, each in enumerate(records)})
    texts = {caption: number for number, each in enumerate(records) for caption in each.captions}
    text = Held({KEYS.text(caption): torch.full((1, 1), number) for caption, number in {**texts, "": -1}.items()})
    return records, order, latents, text


@settings(max_examples=300, deadline=None)
@given(runs(), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]), st.integers(0, 6))
def test_ranks_and_resuming_change_nothing_of_any_run(run, shared, start):
    """Twelve micro-batches a step, shared by ranks in every way, from any step on: the stream of one rank from 0."""
    records, order, latents, text = run
    ranks, accumulation = shared

    def course(first: int, last: int, rank: int, ranks: int, accumulation: int) -> list[list[Any]]:
        batches = Batches(
            order, records, latents, text, KEYS, seed=3, caption_dropout=0.2, rank=rank, ranks=ranks,
            accumulation=accumulation,
        )  # fmt: skip
        return [[seen(pair) for pair in batches.load(step)] for step in range(first, last)]

    alone = course(0, start + 2, 0, 1, 12)
    parts = [course(start, start + 2, rank, ranks, accumulation) for rank in range(ranks)]
    for step in range(2):
        mixed: list[Any] = [None] * 12
        for rank in range(ranks):
            mixed[rank::ranks] = parts[rank][step]
        assert mixed == alone[start + step]
    for _, ids, numbers, captions, role in (one for step in alone for one in step):
        chosen = [records[number] for number in numbers]
        assert [each.id for each in chosen] == list(ids), "latents belong to their pictures"
        assert len({(each.dataset, each.placement.target) for each in chosen}) == 1 and {role} == {chosen[0].role}
        assert all(caption in (-1, number) for number, caption in zip(numbers, captions, strict=True)), "and captions"


def seen(pair) -> tuple[Any, ...]:
    micro_batch, batch = pair
    numbers, captions = batch.latents[:, 0, 0, 0].tolist(), batch.text[:, 0, 0].tolist()
    return micro_batch.index, batch.ids, numbers, captions, batch.role


# ---- masks and caches of one's own ----


def test_masks_come_with_their_pictures_and_stay_out_elsewhere():
    masked = [replace(record(f"{n}.png"), mask_key=f"{n}.png", mask_hash=str(n)) for n in range(3)]
    records = [*masked, *(record(f"{n}.png", Size(96, 64)) for n in range(3, 5))]
    buckets = [Bucket("cats", SIZES[0], (0, 1, 2), 2), Bucket("cats", SIZES[1], (3, 4), 2)]
    latents = Held({KEYS.latent(each): torch.zeros(1, 8, each.placement.target.width // 8) for each in records})
    text = Held({KEYS.text(each): torch.zeros(1, 1) for each in ("a cat", "")})
    of = {each.id: torch.full((1, 8, 8), (number + 1) / 4) for number, each in enumerate(masked)}
    batches = Batches(
        Order(buckets, {}, "uniform", 0), records, latents, text, KEYS, seed=0, masks=lambda each: of[each.id]
    )
    found = [batch for step in range(6) for _, batch in batches.load(step)]
    assert {batch.loss_mask is None for batch in found} == {True, False}
    for batch in found:
        if batch.loss_mask is None:
            assert batch.latents.shape[-1] == 12
        else:
            assert batch.loss_mask.shape == (2, 1, 8, 8)
            assert all(torch.equal(mask, of[name]) for mask, name in zip(batch.loss_mask, batch.ids, strict=True))
    assert all(b.loss_mask is None for step in range(6) for _, b in Batches(
        Order(buckets, {}, "uniform", 0), records, latents, text, KEYS, seed=0).load(step))  # fmt: skip


@pytest.mark.parametrize(("kind", "share", "least", "most"), [("mask", 0.3, 200, 200), ("segmentation", 0.3, 40, 80)])
def test_segmentation_is_applied_to_its_share_and_other_masks_always(kind, share, least, most):
    records = [replace(record("0.png"), mask_key="0.png", mask_hash="0", mask_kind=kind)]
    latents, text = Held({KEYS.latent(records[0]): torch.zeros(1, 8, 8)}), Held({KEYS.text("a cat"): torch.zeros(1, 1)})
    order = Order([Bucket("cats", SIZES[0], (0,), 1)], {}, "uniform", 0)
    batches = Batches(
        order, records, latents, text, KEYS, seed=0, masks=lambda each: torch.zeros(1, 8, 8), segmentation_share=share
    )
    masks = [batch.loss_mask for step in range(200) for _, batch in batches.load(step)]
    applied = sum(not mask.any() for mask in masks)
    assert least <= applied <= most and all(mask.eq(1).all() for mask in masks if mask.any())


def test_every_dataset_reads_its_own_caches():
    records = [record("0.png", dataset="one"), record("0.png", dataset="two")]
    buckets = [Bucket(each.dataset, SIZES[0], (number,), 1) for number, each in enumerate(records)]
    latents = {each.dataset: Held({KEYS.latent(each): torch.full((1, 8, 8), n)}) for n, each in enumerate(records)}
    texts = {each.dataset: Held({KEYS.text("a cat"): torch.full((1, 1), n)}) for n, each in enumerate(records)}
    batches = Batches(
        Order(buckets, {}, "uniform", 0),
        records,
        lambda r: latents[r.dataset],
        lambda r: texts[r.dataset],
        KEYS,
        seed=0,
    )
    found = {
        batch.ids: (number(batch.latents), batch.text.flatten().tolist())
        for s in (0, 1)
        for _, batch in batches.load(s)
    }
    assert found == {("one/0.png",): ([0], [0.0]), ("two/0.png",): ([1], [1.0])}


# ---- prefetching ----


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("batches")}


def test_prefetching_works_ahead_but_no_further():
    loaded: list[int] = []
    ahead = prefetched(lambda n: loaded.append(n) or n, range(100), 3)
    assert not loaded
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(loaded) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert loaded == [0, 1, 2, 3]
    ahead.close()


def test_prefetching_keeps_the_order_and_ends():
    assert list(prefetched(lambda n: n * n, range(10), 4)) == [n * n for n in range(10)]
    assert list(prefetched(lambda n: n, range(3), 0)) == [0, 1, 2]
    assert not threads()


def test_an_error_of_the_thread_is_raised_at_its_place():
    def load(n: int) -> int:
        if n == 3:
            raise ValueError("number three")
        return n

    results = prefetched(load, range(10), 5)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="number three"):
        next(results)
    assert not threads()


def test_closing_ends_the_thread():
    results = prefetched(lambda n: n, range(10**9), 4)
    next(results)
    assert threads()
    results.close()
    assert not threads()
