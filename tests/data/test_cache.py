from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sana_tune.data.cache import TensorCache
from sana_tune.errors import UserError


def tensor(seed: int, shape: tuple[int, ...] = (4, 2, 3), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbered(count: int, start: int = 0):
    return ((str(number), tensor(number)) for number in range(start, start + count))


def shards(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".safetensors")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype):
    one = tensor(1, (3, 5), torch.float32).mul(100).to(dtype)
    TensorCache(tmp_path).fill([("a", one), ("strided", one.t()), ("scalar", one[0, 0]), ("empty", one[:0])])
    cache = TensorCache(tmp_path)
    for key, expected in {"a": one, "strided": one.t(), "scalar": one[0, 0], "empty": one[:0]}.items():
        found = cache.get(key)
        assert found.dtype == dtype and found.shape == expected.shape
        assert torch.equal(found, expected)


def test_a_tensor_is_a_copy_of_its_own(tmp_path: Path):
    cache = TensorCache(tmp_path)
    cache.fill(numbered(1))
    cache.get("0").zero_()
    assert torch.equal(cache.get("0"), tensor(0))


def test_missing_keys_in_order_each_once(tmp_path: Path):
    cache = TensorCache(tmp_path)
    cache.fill(numbered(2))
    assert cache.missing(["5", "1", "3", "5", "0"]) == ["5", "3"]
    assert len(cache) == 2 and "1" in cache and "5" not in cache and cache.bytes == 2 * 24 * 4


def test_shards_hold_write_batch_size_items(tmp_path: Path):
    TensorCache(tmp_path, write_batch_size=4).fill(numbered(10))
    assert len(shards(tmp_path)) == 3


def test_a_slow_encoder_commits_by_time(tmp_path: Path):
    TensorCache(tmp_path, commit_every_s=0).fill(numbered(3))
    assert len(shards(tmp_path)) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_loses_nothing_that_came(tmp_path: Path, error: type[BaseException]):
    def broken():
        yield from numbered(5)
        raise error

    with pytest.raises(error):
        TensorCache(tmp_path, write_batch_size=4).fill(broken())
    assert len(TensorCache(tmp_path)) == 5


def test_adding_goes_on_where_it_stopped(tmp_path: Path):
    TensorCache(tmp_path).fill(numbered(3))
    cache = TensorCache(tmp_path)
    with cache.writer() as writer:
        for key, one in numbered(6):
            writer.add(key, one)
            writer.add(key, one)
        assert cache.missing(map(str, range(6))) == ["3", "4", "5"]
        writer.flush()
        assert cache.missing(map(str, range(6))) == []
    assert all(torch.equal(TensorCache(tmp_path).get(key), one) for key, one in numbered(6))


def test_what_is_there_is_not_written_again(tmp_path: Path):
    TensorCache(tmp_path).fill(numbered(2))
    cache = TensorCache(tmp_path)
    cache.fill([("0", tensor(7)), ("1", tensor(8))])
    assert len(shards(tmp_path)) == 1 and torch.equal(cache.get("0"), tensor(0))


def test_nothing_to_write_writes_nothing(tmp_path: Path):
    TensorCache(tmp_path / "cache").fill([])
    assert not shards(tmp_path / "cache")
    TensorCache(tmp_path / "other").missing(["a"])
    assert not (tmp_path / "other").exists()


def test_reading_from_threads(tmp_path: Path):
    cache = TensorCache(tmp_path, write_batch_size=2)
    cache.fill(numbered(20))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(cache.get, [str(n % 20) for n in range(400)]))
    assert all(torch.equal(one, tensor(n % 20)) for n, one in enumerate(found))


def test_what_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="has no item nokey"):
        TensorCache(tmp_path).get("nokey")


def test_a_damaged_item_is_told(tmp_path: Path):
    TensorCache(tmp_path).fill(numbered(1))
    (name,) = shards(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 255
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        TensorCache(tmp_path).get("0")


def test_a_dtype_without_a_name_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="complex64"):
        TensorCache(tmp_path).fill([("a", torch.zeros(1, dtype=torch.complex64))])
