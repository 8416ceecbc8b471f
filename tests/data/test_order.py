from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.data.buckets import Bucket
from sana_tune.data.geometry import Size
from sana_tune.data.order import Order, pictures
from sana_tune.data.records import digest
from sana_tune.data.timeline import Phases, Window


def make(*shapes: tuple[str, int, int, int]) -> tuple[Bucket, ...]:
    """Buckets from (dataset, pictures, batch size, repeats); the records are numbered through."""
    buckets, first = [], 0
    for number, (dataset, count, batch_size, repeats) in enumerate(shapes):
        size = Size(32 * (number + 1), 32)
        buckets.append(Bucket(dataset, size, tuple(range(first, first + count)), batch_size, repeats))
        first += count
    return tuple(buckets)


@st.composite
def some_buckets(draw) -> tuple[Bucket, ...]:
    shapes = []
    for dataset in "abc"[: draw(st.integers(1, 3))]:
        batch_size, repeats = draw(st.integers(1, 5)), draw(st.integers(0, 3))
        shapes += [(dataset, n, batch_size, repeats) for n in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))]
    return make(*shapes)


modes = st.sampled_from(["auto-weighting", "uniform"])
weights = st.fixed_dictionaries({name: st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.3]) for name in "abc"})


# ---- the epoch ----


@settings(max_examples=60)
@given(some_buckets(), weights, modes, st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_shows_every_picture_as_often_as_it_should(buckets, weights, mode, seed, epoch):
    order = Order(buckets, weights, mode, seed)
    total = order.micro_batches_per_epoch
    assert total == sum(bucket.micro_batches for bucket in buckets)
    batches = [order.micro_batch(epoch * total + place) for place in range(total)]
    assert [batch.index for batch in batches] == [epoch * total + place for place in range(total)]
    assert {batch.epoch for batch in batches} == {epoch}
    for number, bucket in enumerate(buckets):
        own = [batch for batch in batches if batch.bucket == number]
        assert len(own) == bucket.micro_batches
        assert all(len(batch.records) == batch.batch_size == bucket.batch_size for batch in own)
        seen = Counter(record for batch in own for record in batch.records)
        assert set(seen) == set(bucket.records)
        assert min(seen.values()) >= bucket.passes
        assert sum(seen.values()) == bucket.visits + bucket.filled


def test_the_order_is_pure_and_depends_on_seed_and_epoch():
    buckets = make(("a", 40, 2, 1), ("b", 30, 4, 0))
    epochs = {}
    for seed in (0, 1):
        order = Order(buckets, {}, "uniform", seed)
        total = order.micro_batches_per_epoch
        straight = [order.micro_batch(place) for place in range(3 * total)]
        backwards = [Order(buckets, {}, "uniform", seed).micro_batch(p) for p in reversed(range(3 * total))]
        assert straight == backwards[::-1]
        for epoch in range(3):
            epochs[seed, epoch] = [batch.records for batch in straight[epoch * total : (epoch + 1) * total]]
    assert len({str(epoch) for epoch in epochs.values()}) == 6


def test_a_pinned_order():
    """A resumed run must find the order of the run it continues, whatever version it is resumed by."""
    order = Order(make(("a", 5, 2, 1), ("b", 3, 2, 0)), {"a": 0.5}, "auto-weighting", 7)
    assert [order.micro_batch(index).records for index in range(7)] == [
        (6, 7),
        (3, 4),
        (0, 2),
        (1, 3),
        (5, 7),
        (2, 4),
        (0, 1),
    ]


def test_the_order_of_forty_runs_is_pinned():
    """As it was before datasets could start and end: what was begun then goes on unchanged."""
    found = []
    for number in range(40):
        buckets, first, datasets = [], 0, 1 + number % 3
        for place in range(1 + number % 5):
            count, which = 1 + (7 * number + 11 * place) % 23, place % datasets
            records = tuple(range(first, first + count))
            size, batch_size = Size(32 * (place + 1), 32), 1 + (number + which) % 5
            buckets.append(Bucket("abc"[which], size, records, batch_size, number % 4))
            first += count
        order = Order(buckets, {"b": 0.5, "c": 3.0}, ("auto-weighting", "uniform")[number % 2], number)
        for index in range(0, 3 * order.micro_batches_per_epoch, 1 + number % 7):
            batch = order.micro_batch(index)
            found.append([batch.index, batch.epoch, batch.bucket, list(batch.records)])
    assert (len(found), digest(found)) == (1761, "57dd80a6b31c70ccb48ba5f1a797dd63")


def test_repeats_show_all_pictures_once_before_any_again():
    order = Order(make(("a", 12, 3, 9), ("a", 6, 3, 9)), {}, "uniform", 3)
    for round_ in range(10):
        shown = [r for i in range(round_ * 6, round_ * 6 + 6) for r in order.micro_batch(i).records]
        assert sorted(shown) == list(range(18))


def test_repeats_that_do_not_fit_the_batch_stay_even():
    """Pictures seen differ by at most one pass and a micro-batch at any time."""
    order, seen = Order(make(("a", 7, 4, 20), ("a", 3, 4, 20)), {}, "uniform", 3), Counter(range(10))
    for index in range(order.micro_batches_per_epoch - 2):
        seen.update(order.micro_batch(index).records)
        assert max(seen.values()) - min(seen.values()) <= 2


# ---- fill-ins ----


def test_one_picture_works():
    order = Order(make(("a", 1, 4, 0)), {}, "auto-weighting", 0)
    assert order.micro_batches_per_epoch == 1
    assert order.micro_batch(5).records == (0, 0, 0, 0)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3), st.integers(0, 1000))
def test_fill_ins_are_distinct_while_there_are_others(count: int, batch_size: int, repeats: int, seed: int):
    (bucket,) = make(("a", count, batch_size, repeats))
    last = pictures(bucket, bucket.micro_batches - 1, (seed,))
    own, fill = last[: batch_size - bucket.filled], last[batch_size - bucket.filled :]
    unseen = count - len(set(own))
    assert len(set(fill[:unseen])) == min(len(fill), unseen)
    assert not set(fill[:unseen]) & set(own)
    assert max(Counter(fill).values(), default=0) <= -(-len(fill) // count) + 1


# ---- datasets that start and end ----

schedules = st.fixed_dictionaries(
    {
        name: st.builds(
            Window,
            start_epoch=st.integers(1, 3),
            start_step=st.integers(0, 25),
            end_epoch=st.one_of(st.none(), st.integers(3, 5)),
            end_step=st.one_of(st.none(), st.integers(25, 60)),
        )
        for name in "bc"
    }
)


@settings(max_examples=200, deadline=None)
@given(some_buckets(), weights, modes, st.integers(0, 2**32), schedules, st.integers(1, 4))
def test_a_schedule_moves_datasets_and_changes_nothing_inside_them(buckets, weights, mode, seed, when, per_step):
    """In an epoch that shows a dataset whole, its pictures come as often as they should; the rest is left as it was."""
    order = Order(buckets, weights, mode, seed, when, per_step)
    alone = {
        name: Order([b for b in buckets if b.dataset == name], {}, mode, seed) for name in "abc"[: len(names(buckets))]
    }
    by_epoch: dict[tuple[int, str], list[tuple[int, ...]]] = {}
    for index in range(150):
        batch = order.micro_batch(index)
        bucket, step = buckets[batch.bucket], index // per_step + 1
        assert len(batch.records) == bucket.batch_size and set(batch.records) <= set(bucket.records)
        if window := when.get(bucket.dataset):
            assert max(1, window.start_step) <= step <= (window.end_step or step)
            assert window.start_epoch <= batch.epoch + 1 <= (window.end_epoch or batch.epoch + 1)
        by_epoch.setdefault((batch.epoch, bucket.dataset), []).append(batch.records)
    again = Order(buckets, weights, mode, seed, when, per_step)
    assert again.micro_batch(149) == order.micro_batch(149), "any position on its own"
    for (epoch, name), shown in by_epoch.items():
        total = alone[name].micro_batches_per_epoch
        inside = [alone[name].micro_batch(epoch * total + place).records for place in range(total)]
        assert shown == inside[: len(shown)], "the dataset's own order does not depend on the others"


def names(buckets) -> list[str]:
    return sorted({bucket.dataset for bucket in buckets})


# ---- datasets ----


def test_auto_weighting_mixes_datasets_evenly():
    order = Order(make(("a", 900, 1, 0), ("b", 100, 1, 0)), {}, "auto-weighting", 0)
    tenths = [sum(order.micro_batch(i).bucket for i in range(k, k + 100)) for k in range(0, 1000, 100)]
    assert all(5 <= share <= 15 for share in tenths) and sum(tenths) == 100


def test_uniform_weights_take_turns_until_one_is_dry():
    order = Order(make(("a", 900, 1, 0), ("b", 100, 1, 0)), {}, "uniform", 0)
    chosen = [order.micro_batch(i).bucket for i in range(1000)]
    assert sum(chosen[:200]) == 100 and not any(chosen[200:])


def test_probability_shifts_the_shares():
    order = Order(make(("a", 300, 1, 0), ("b", 300, 1, 0)), {"a": 1.0, "b": 3.0}, "auto-weighting", 0)
    chosen = [order.micro_batch(i).bucket for i in range(600)]
    assert sum(chosen[:400]) == 300  # three b for one a, until b is dry after 400


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 99))
def test_phases_are_exact(datasets: list[tuple[int, int]], seed: int):
    counts = [count for count, _ in datasets]
    weights = [Fraction(weight, 4) for _, weight in datasets]
    phases = Phases(counts, weights)
    turns = [phases.at(place, (seed,)) for place in range(phases.total)]
    for dataset, count in enumerate(counts):
        assert [k for d, k in turns if d == dataset] == list(range(count))
    for end in sorted({count / weight for count, weight in zip(counts, weights, strict=True)}):
        given_ = [min(count, weight * end) for count, weight in zip(counts, weights, strict=True)]
        place = sum(int(share + Fraction(1, 2)) for share in given_)
        so_far = Counter(dataset for dataset, _ in turns[:place])
        assert all(abs(so_far[d] - share) <= Fraction(1, 2) for d, share in enumerate(given_))


def test_a_dataset_keeps_its_inner_order_when_another_one_joins():
    alone = Order(make(("a", 20, 2, 0)), {}, "uniform", 5)
    joined = Order(make(("a", 20, 2, 0), ("b", 20, 2, 0)), {}, "uniform", 5)
    own = [batch.records for i in range(20) if (batch := joined.micro_batch(i)).bucket == 0]
    assert sorted(own) == sorted(alone.micro_batch(i).records for i in range(10))


@pytest.mark.parametrize("weights, mode, message", [({"a": 0.0}, "uniform", "above 0"), ({}, "fair", "found 'fair'")])
def test_what_makes_no_order_is_refused(weights, mode: str, message: str):
    with pytest.raises(ValueError, match=message):
        Order(make(("a", 1, 1, 0)), weights, mode, 0)
    with pytest.raises(ValueError, match="at least one bucket"):
        Order((), {}, "uniform", 0)


def test_a_thousand_repeats_of_ten_thousand_pictures_start_at_once():
    buckets = make(*[("a", 1000, 4, 1000)] * 10)
    tracemalloc.start()
    begin = time.perf_counter()
    order = Order(buckets, {}, "auto-weighting", 0)
    last = order.micro_batch(order.micro_batches_per_epoch * 3 - 1)
    took_s, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.micro_batches_per_epoch == 10 * 1001 * 250 and last.epoch == 2
    assert took_s < 0.2 and peak < 1_000_000
