from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from sana_tune.data.buckets import Bucket
from sana_tune.data.cache import TensorCache
from sana_tune.data.geometry import Size
from sana_tune.data.loader import Batches, choose_caption, drops_caption, padded, prefetched
from sana_tune.data.order import Order
from sana_tune.data.records import Keys, Record
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
