from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sana_tune.data.buckets import Bucket, make_buckets
from sana_tune.data.geometry import Size
from tests.data.pictures import dataset, record


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
