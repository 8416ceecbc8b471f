from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.config.datasets import EvalDataset
from sana_tune.data.buckets import Bucket, make_buckets, merged, settle, trained
from sana_tune.data.geometry import Box, Size
from sana_tune.data.memory import FileMemory
from sana_tune.data.order import Order
from sana_tune.data.records import Role
from sana_tune.data.survey import DatasetLedger, Ledger, Survey, survey
from sana_tune.data.timeline import Window
from tests.data.pictures import dataset, put, record


@given(st.integers(1, 50), st.integers(1, 10), st.integers(0, 20))
def test_counts_balance(pictures: int, batch_size: int, repeats: int):
    bucket = Bucket("cats", Size(64, 64), tuple(range(pictures)), batch_size, repeats)
    assert bucket.micro_batches * batch_size == pictures * (repeats + 1) + bucket.filled
    assert 0 <= bucket.filled < batch_size


def test_one_picture_fills_a_batch():
    bucket = Bucket("cats", Size(64, 64), (0,), 4)
    assert (bucket.micro_batches, bucket.filled) == (1, 3)


def test_buckets_by_dataset_then_size():
    folder = Path("unused")
    datasets = [dataset(folder, "small", train_batch_size=2), dataset(folder, "big", train_batch_size=3, repeats=5)]
    records = [
        record("a", Size(96, 64), "big"),
        record("b", Size(64, 96), "big"),
        record("c", Size(64, 64), "small"),
        record("d", Size(96, 64), "big"),
    ]
    assert make_buckets(records, datasets) == (
        Bucket("small", Size(64, 64), (2,), 2, 0),
        Bucket("big", Size(64, 96), (1,), 3, 5),
        Bucket("big", Size(96, 64), (0, 3), 3, 5),
    )


def test_two_datasets_on_one_folder_share_nothing():
    datasets = [dataset(Path("unused"), id) for id in ("one", "two")]
    records = [record("a", dataset="one"), record("a", dataset="two")]
    assert [bucket.records for bucket in make_buckets(records, datasets)] == [(0,), (1,)]


# ---- roles ----


def test_held_out_pictures_have_buckets_that_no_epoch_shows():
    held = EvalDataset(id="held", instance_data_dir="unused", resolution=64, repeats=4, train_batch_size=2)
    records = [record("a"), *(replace(record(name, dataset="held"), role=Role.EVAL) for name in "bc")]
    buckets = make_buckets(records, [dataset(Path("unused")), held])
    assert [(bucket.dataset, bucket.role, bucket.repeats) for bucket in buckets] == [
        ("cats", Role.TRAIN, 0), ("held", Role.EVAL, 0),
    ]  # fmt: skip
    assert trained(buckets) == buckets[:1]


# ---- small buckets ----

SQUARE, WIDE, TALL, WIDER = Size(64, 64), Size(96, 48), Size(48, 96), Size(112, 40)


def counted(counts: dict[Size, int], **settings: Any) -> dict[Size, Size]:
    return merged(counts, dataset(Path("unused"), **settings))


def test_a_small_bucket_goes_to_the_nearest_aspect():
    assert counted({SQUARE: 10, WIDE: 1, WIDER: 8}, train_batch_size=4) == {WIDE: WIDER}, "2:1 is nearer to 2.8:1"
    assert counted({SQUARE: 10, WIDE: 4, TALL: 1}, train_batch_size=4) == {TALL: SQUARE}
    assert counted({SQUARE: 1, WIDE: 4, TALL: 5}, train_batch_size=4) == {SQUARE: TALL}, "of two as near the larger"
    assert counted({SQUARE: 1, WIDE: 1}, train_batch_size=2, repeats=1) == {}, "passes fill a batch too"


def test_small_buckets_gather_until_none_is_small_or_one_is_left():
    assert counted({SQUARE: 1, WIDE: 1, WIDER: 2, TALL: 9}, train_batch_size=3) == {WIDE: WIDER, SQUARE: TALL}
    assert len(set(counted({SQUARE: 1, WIDE: 1, TALL: 1}, train_batch_size=9).values())) == 1
    assert counted({SQUARE: 1}, train_batch_size=9) == {}


@settings(max_examples=300)
@given(
    st.dictionaries(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 12), min_size=1, max_size=9),
    st.integers(1, 9), st.integers(0, 2),
)  # fmt: skip
def test_after_merging_no_bucket_is_small_but_an_only_one(shapes, batch_size, repeats):
    counts = {Size(8 * width, 8 * height): count for (width, height), count in shapes.items()}
    into = counted(counts, train_batch_size=batch_size, repeats=repeats)
    left: dict[Size, int] = {}
    for size, count in counts.items():
        target = into.get(size, size)
        left[target] = left.get(target, 0) + count
    assert sum(left.values()) == sum(counts.values()) and set(left) <= set(counts)
    assert len(left) == 1 or all(count * (repeats + 1) >= batch_size for count in left.values())
    whole = {size for size, count in counts.items() if count * (repeats + 1) >= batch_size}
    assert whole <= set(left), "only small buckets go away"
    assert into == counted(dict(reversed(counts.items())), train_batch_size=batch_size, repeats=repeats)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Seven squares, two wide pictures and a tall one."""
    for number in range(7):
        put(tmp_path, f"square{number}.png", 100, 100, seed=number, caption="a")
    for number in range(2):
        put(tmp_path, f"wide{number}.png", 160, 100, seed=10 + number, caption="a")
    put(tmp_path, "tall.png", 100, 150, seed=20, caption="a")
    return tmp_path


def settled(folder: Path, **settings: Any) -> Survey:
    entry = dataset(folder, caption_strategy="textfile", train_batch_size=4, **settings)
    found = survey([entry], alignment=8, rounding=2, prompt_case="lower", memory=FileMemory())
    return settle(found, [entry], alignment=8, rounding=2, seed=0)


def targets(found: Survey) -> dict[str, str]:
    return {one.key: str(one.placement.target) for one in found.records if not one.key.startswith("square")}


def test_filled_buckets_are_left_as_they_are(ten: Path):
    found = settled(ten)
    assert targets(found) == {"tall.png": "56x80", "wide0.png": "80x48", "wide1.png": "80x48"} and not found.problems


def test_merged_pictures_are_placed_anew_and_said(ten: Path):
    found = settled(ten, small_buckets="merge")
    assert targets(found) == {"tall.png": "64x64", "wide0.png": "64x64", "wide1.png": "64x64"} and not found.problems
    (ledger,) = found.ledger.datasets
    assert ledger.balances() and sorted(ledger.merged) == [
        ("tall.png", "56x80", "64x64"), ("wide0.png", "80x48", "64x64"), ("wide1.png", "80x48", "64x64"),
    ]  # fmt: skip
    wide = next(one for one in found.records if one.key == "wide0.png").placement
    assert (str(wide.resize), wide.crop_box) == ("102x64", Box(19, 0, 83, 64)), "resized once, from the original"


def test_a_merged_picture_that_would_be_enlarged_too_much_is_left_out(ten: Path):
    put(ten, "strip.png", 320, 16, seed=30, caption="a")
    found = settled(ten, small_buckets="merge", max_upscale_threshold=1.0)
    (ledger,) = found.ledger.datasets
    assert [key for key, _ in ledger.left_out] == ["strip.png"] and ledger.balances()
    assert "its bucket 288x16 was merged into 64x64" in ledger.left_out[0][1]


def test_dropped_buckets_are_in_the_ledger(ten: Path):
    found = settled(ten, small_buckets="drop")
    assert targets(found) == {} and len(found.records) == 7 and not found.problems
    (ledger,) = found.ledger.datasets
    assert ledger.balances() and dict(ledger.left_out)["wide0.png"] == (
        "its bucket 80x48 has 2 pictures, fewer than train_batch_size 4 (small_buckets drop)"
    )


def test_a_dataset_of_small_buckets_alone_cannot_drop_them(tmp_path: Path):
    put(tmp_path, "a.png", 100, 100, caption="a")
    (problem,) = settled(tmp_path, small_buckets="drop").problems
    assert "every bucket is smaller than a batch of 4" in problem.what and "fill or merge" in problem.fix
    assert settled(tmp_path, small_buckets="merge").problems == ()


def test_small_buckets_can_be_an_error_with_the_numbers(ten: Path):
    (problem,) = settled(ten, small_buckets="error").problems
    assert "56x80 (1 picture), 80x48 (2 pictures)" in problem.what
    assert "set repeats to 3 or train_batch_size to 1" in problem.fix
    assert settled(ten, small_buckets="error", repeats=3).problems == ()
    (problem,) = settled(ten, small_buckets="error", repeats=1).problems
    assert "shown 2 times" in problem.what and "repeats to 3 or train_batch_size to 2" in problem.fix


def test_held_out_pictures_are_never_merged(ten: Path):
    entry = EvalDataset(
        id="cats", instance_data_dir=str(ten), resolution=64, caption_strategy="textfile", train_batch_size=4,
        small_buckets="drop",
    )  # fmt: skip
    found = survey([entry], alignment=8, rounding=2, prompt_case="lower", memory=FileMemory())
    assert settle(found, [entry], alignment=8, rounding=2, seed=0) == found


def test_ten_thousand_pictures_shown_a_thousand_times_start_at_once(tmp_path: Path):
    """From the records to the first micro-batch, with everything that makes it harder; and one a billion steps on."""
    shapes = [Size(8 * (4 + n % 9), 8 * (4 + n % 7)) for n in range(10_000)]
    entries = [dataset(tmp_path, name, train_batch_size=4, repeats=1000, small_buckets="merge") for name in ("a", "b")]
    records = [record(f"{n}.png", shapes[n], "ab"[n % 2]) for n in range(10_000)]
    ledger = Ledger(tuple(DatasetLedger(name, 5000, 5000) for name in ("a", "b")))
    begin = time.thread_time()
    found = settle(Survey(tuple(records), ledger), entries, alignment=8, rounding=2, seed=0)
    buckets = make_buckets(found.records, entries)
    order = Order(buckets, {"b": 0.3}, "auto-weighting", 0, {"b": Window(start_step=77, end_epoch=9)}, 8)
    first, far = order.micro_batch(0), order.micro_batch(10**9)
    assert time.thread_time() - begin < 5  # it takes 0.2 s
    assert sum(bucket.visits for bucket in buckets) == 10_000 * 1001 and first.epoch == 0 and far.epoch > 700
