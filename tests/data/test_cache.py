from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sana_tune.data.cache import InMemory, LostItem, OnDemand, TensorCache
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


# ---- packed ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_packed_tensors_come_back_bit_by_bit_and_plain_ones_beside_them(tmp_path: Path, dtype: torch.dtype):
    ones = {str(seed): tensor(seed, (40, 33)).mul(9).to(dtype) for seed in range(3)}
    ones |= {"scalar": ones["0"][0, 0], "empty": ones["0"][:0], "strided": ones["1"].t()}
    TensorCache(tmp_path).fill([("plain", ones["2"])])
    packed = TensorCache(tmp_path, compress=True)
    packed.fill(ones.items())
    for cache in (packed, TensorCache(tmp_path), TensorCache(tmp_path, compress=True)):
        for key, one in {**ones, "plain": ones["2"]}.items():
            found = cache.get(key)
            assert found.dtype == dtype and found.shape == one.shape and torch.equal(found, one)
            found.zero_()


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.9), (torch.bfloat16, 0.8)])
def test_what_packing_saves(tmp_path: Path, dtype: torch.dtype, share: float):
    one = tensor(1, (32, 16, 16)).to(dtype)
    cache = TensorCache(tmp_path, compress=True)
    cache.fill([("a", one)])
    assert cache.bytes < share * one.numel() * one.element_size()


def test_a_packed_item_that_is_pruned_or_mended_stays_packed(tmp_path: Path):
    cache = TensorCache(tmp_path, compress=True)
    cache.fill(("ab"[seed], tensor(seed, (40, 40))) for seed in range(2))
    TensorCache(tmp_path).prune(lambda key: key == "b")
    assert torch.equal(TensorCache(tmp_path).get("b"), tensor(1, (40, 40)))


# ---- lost and made again ----


def damage(folder: Path, cache: TensorCache, key: str) -> str:
    """Turn a bit of an item over. Answers its file."""
    place = cache.index.items[key] if key in cache.index.items else cache._items[key]
    path = folder / place.file
    data = bytearray(path.read_bytes())
    data[place.offset] ^= 1
    path.write_bytes(data)
    return place.file


def test_a_damaged_item_is_set_aside_with_its_file_and_only_it_is_missing(tmp_path: Path):
    cache = TensorCache(tmp_path)
    cache.fill(numbered(4))
    file = damage(tmp_path, cache, "2")
    assert torch.equal(cache.get("1"), tensor(1)), "its neighbours are sound"
    with pytest.raises(LostItem) as lost:
        cache.get("2")
    assert (lost.value.key, lost.value.file, lost.value.cache) == ("2", file, cache)
    cache.mend(lost.value)
    assert cache.missing(map(str, range(4))) == ["2"] and (tmp_path / f"{file}.bad").exists()
    cache.fill(numbered(4))
    assert all(torch.equal(TensorCache(tmp_path).get(key), one) for key, one in numbered(4))


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 30)])
def test_a_file_that_is_gone_or_cut_off_while_it_is_read_from(tmp_path: Path, harm):
    cache = TensorCache(tmp_path, write_batch_size=2)
    cache.fill(numbered(4))
    harm(tmp_path / cache._items["0"].file)
    with pytest.raises(LostItem) as lost:
        TensorCache.get(cache, "0")
    cache.mend(lost.value)
    assert cache.missing(map(str, range(4))) == ["0", "1"]


def test_what_another_process_removed_or_rewrote_is_found_again(tmp_path: Path):
    cache, other = TensorCache(tmp_path), TensorCache(tmp_path)
    cache.fill(numbered(4))
    other.refresh()
    assert len(other) == 4 and other.prune(lambda key: key != "0").items == 1
    fresh = TensorCache(tmp_path)
    fresh._items = dict(cache._items)  # as a process that looked before the pruning, and has read nothing yet
    with pytest.raises(LostItem) as lost:
        fresh.get("0")
    fresh.mend(lost.value)
    assert fresh.missing("0123") == ["0"] and torch.equal(fresh.get("3"), tensor(3))


def test_refreshing_sees_what_others_wrote(tmp_path: Path):
    cache, other = TensorCache(tmp_path), TensorCache(tmp_path)
    cache.fill(numbered(2))
    assert "0" not in other
    other.refresh()
    assert "0" in other and torch.equal(other.get("1"), tensor(1))


def test_torn_shards_are_set_aside_when_it_is_opened_and_stay_where_nobody_may_write(tmp_path: Path, monkeypatch):
    TensorCache(tmp_path, write_batch_size=2).fill(numbered(4))
    name = shards(tmp_path)[0]
    os.truncate(tmp_path / name, 50)
    cache = TensorCache(tmp_path)
    with monkeypatch.context() as shut:
        shut.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        assert list(cache.set_aside_torn()) == [name] and name in shards(tmp_path)
    assert list(cache.set_aside_torn()) == [name] and name not in shards(tmp_path)
    assert cache.set_aside_torn() == {} and len(cache) == 2


# ---- on demand ----


class Maker:
    """Makes tensors by number, and remembers which."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, key: str) -> tuple[torch.Tensor, str] | None:
        if not key.isdigit():
            return None
        self.made.append(key)
        return tensor(int(key)), f"of number {key}"


@pytest.mark.parametrize("size", [1, 2, 100])
def test_on_demand_makes_what_is_missing_once_and_keeps_it(tmp_path: Path, size: int):
    TensorCache(tmp_path).fill(numbered(2))
    maker, cache = Maker(), TensorCache(tmp_path, write_batch_size=size)
    demand = OnDemand(cache, maker, store=True)
    for key in "012342100":
        found = demand.get(key)
        assert torch.equal(found, tensor(int(key)))
        found.zero_()
    demand.close()
    assert maker.made == ["2", "3", "4"] and len(TensorCache(tmp_path)) == 5
    with pytest.raises(LostItem, match="has no item prompt"):
        demand.get("prompt")


def test_what_is_not_kept_is_made_each_time_and_nothing_is_written(tmp_path: Path):
    maker = Maker()
    demand = OnDemand(TensorCache(tmp_path / "cache"), maker, store=False)
    assert [torch.equal(demand.get(key), tensor(int(key))) for key in "010"] == [True] * 3
    demand.close()
    assert maker.made == ["0", "1", "0"] and not (tmp_path / "cache").exists()


def test_threads_share_what_is_made_on_demand(tmp_path: Path):
    maker = Maker()
    demand = OnDemand(TensorCache(tmp_path, write_batch_size=3), maker, store=True)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(demand.get, [str(n % 8) for n in range(200)]))
    demand.close()
    assert sorted(maker.made) == list("01234567")
    assert all(torch.equal(one, tensor(n % 8)) for n, one in enumerate(found))


def test_in_memory_reads_once(tmp_path: Path):
    cache = TensorCache(tmp_path)
    cache.fill(numbered(1))
    kept = InMemory(cache)
    first = kept.get("0")
    os.remove(tmp_path / shards(tmp_path)[0])
    assert kept.get("0") is first
