from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sana_tune.data import shards
from sana_tune.data.shards import Item, Reader, Unusable, Writer, scan
from sana_tune.errors import UserError


def item(seed: int, shape: tuple[int, ...] = (3, 4)) -> Item:
    return Item("F32", shape, np.random.default_rng(seed).random(shape, np.float32).tobytes())


def write(folder: Path, *batches: dict[str, Item]) -> None:
    with Writer(folder) as writer:
        for batch in batches:
            writer.write(batch)


def contents(folder: Path) -> dict[str, Item]:
    """Everything in a folder, checksums verified."""
    reader = Reader(folder)
    return {key: Item(place.dtype, place.shape, bytes(reader.read(place))) for key, place in scan(folder).items.items()}


def shard_names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_what_is_written_is_read(tmp_path: Path):
    items = {"a": item(1), "b": item(2, (2, 0)), "c": Item("BF16", (), b"\x80\x3f"), "ü": item(3, (1, 1, 5))}
    write(tmp_path / "deep" / "cache", items)
    assert contents(tmp_path / "deep" / "cache") == items


def test_shards_are_ordinary_safetensors_files(tmp_path: Path):
    write(tmp_path, {"a": item(1), "b": item(2)})
    (name,) = shard_names(tmp_path)
    loaded = safetensors.numpy.load_file(tmp_path / name)
    assert loaded["a"].tobytes() == item(1).data and loaded["b"].shape == (3, 4)


def test_the_writer_says_where_items_lie(tmp_path: Path):
    with Writer(tmp_path) as writer:
        places = writer.write({"a": item(1), "b": item(2)})
    assert places == scan(tmp_path).items


def test_sizes_add_up(tmp_path: Path):
    write(tmp_path, {"a": item(1)}, {"b": item(2), "c": item(3, (5,))})
    index = scan(tmp_path)
    assert len(index) == 3 and "b" in index and "x" not in index and index.bytes == 48 + 48 + 20


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path):
    assert len(scan(tmp_path / "none")) == 0
    assert not (tmp_path / "none").exists()


def test_the_same_items_make_the_same_shard(tmp_path: Path):
    write(tmp_path, {"a": item(1)}, {"a": item(1)})
    write(tmp_path, {"a": item(1)})
    assert len(shard_names(tmp_path)) == 1


def test_foreign_files_are_reported_and_left_alone(tmp_path: Path):
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, {"a": item(1)})
    assert scan(tmp_path).foreign == ("model.safetensors",)
    assert {"model.safetensors", "notes.txt"} < set(shard_names(tmp_path))


def damaged(whole: bytes) -> dict[str, bytes]:
    """A shard, torn in different ways."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def rebuilt(**changes: object) -> bytes:
        text = json.dumps({**header, **changes}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    return {
        "empty": b"",
        "only a length": whole[:8],
        "half a header": whole[: 8 + length // 2],
        "half the data": whole[:-5],
        "zeros": bytes(len(whole)),
        "no JSON": whole[:8] + b"x" * (len(whole) - 8),
        "no checksums": rebuilt(__metadata__={}),
        "no metadata": rebuilt(__metadata__=None),
        "an entry that is none": rebuilt(a=[]),
        "a wrong shape": rebuilt(a={**header["a"], "shape": [3, 5]}),
        "offsets before the data": rebuilt(a={**header["a"], "data_offsets": [-48, 0]}),
        "an unknown dtype": rebuilt(a={**header["a"], "dtype": "F3"}),
    }


def test_torn_shards_are_reported_when_planning_and_set_aside_when_writing(tmp_path: Path):
    write(tmp_path, {"a": item(1), "b": item(2)})
    (name,) = shard_names(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for number, (how, data) in enumerate(damaged(whole).items()):
        (tmp_path / f"{shards.SHARD_PREFIX}{number:02}.safetensors").write_bytes(data)
        (torn,) = scan(tmp_path).torn
        assert torn == f"{shards.SHARD_PREFIX}{number:02}.safetensors", how
        before = shard_names(tmp_path)
        assert set(scan(tmp_path).items) == {"a", "b"}
        assert shard_names(tmp_path) == before  # a scan changes nothing
        with Writer(tmp_path):
            pass
        assert not scan(tmp_path).torn
        assert f"{torn}.bad" in shard_names(tmp_path)
    assert contents(tmp_path) == {"a": item(1), "b": item(2)}


def test_a_flipped_bit_is_found_and_the_file_named(tmp_path: Path):
    write(tmp_path, {"a": item(1), "b": item(2)})
    (name,) = shard_names(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1  # in the last item, b
    (tmp_path / name).write_bytes(data)
    reader, items = Reader(tmp_path), scan(tmp_path).items
    assert bytes(reader.read(items["a"])) == item(1).data
    with pytest.raises(UserError, match=rf"{name}: this cache file is damaged(.|\n)*start again"):
        reader.read(items["b"])


def test_a_shard_deleted_meanwhile_is_told(tmp_path: Path):
    write(tmp_path, {"a": item(1)})
    place = scan(tmp_path).items["a"]
    (tmp_path / place.file).unlink()
    with pytest.raises(Unusable, match="this cache file is gone") as raised:
        Reader(tmp_path).read(place)
    assert raised.value.lost and raised.value.file == place.file
    shutil.rmtree(tmp_path)
    with pytest.raises(Unusable, match="this cache folder is gone") as raised:
        Reader(tmp_path).read(place)
    assert not raised.value.lost


def test_leftovers_of_killed_writers_go_but_not_those_of_living_ones(tmp_path: Path):
    left = tmp_path / ".writing-0123.tmp"
    with Writer(tmp_path) as living:
        left.touch()
        with Writer(tmp_path) as second:
            assert left.exists()
            second.write({"a": item(1)})
        living.write({"b": item(2)})
    with Writer(tmp_path):
        assert not left.exists()
    assert set(scan(tmp_path).items) == {"a", "b"}


def test_a_writer_is_known_to_live_when_the_one_before_it_has_gone(tmp_path: Path):
    left = tmp_path / ".writing-0123.tmp"
    with Writer(tmp_path) as first, Writer(tmp_path):
        first.__exit__(None, None, None)
        left.touch()
        with Writer(tmp_path):
            assert left.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_by_mode(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"), Writer(tmp_path / "cache"):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this cache folder cannot be written"), Writer(tmp_path / "file"):
        pass


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Writer(tmp_path) as writer:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(UserError, match="No space left on device"):
                writer.write({"a": item(1)})
        assert os.listdir(tmp_path) == [".writers.lock"]
        writer.write({"a": item(1)})
    assert set(scan(tmp_path).items) == {"a"}


def write_forever(folder: Path, told: int) -> None:
    """In a child: commit shard after shard, telling the number of each one once it is committed."""
    with Writer(folder) as writer:
        number = len(scan(folder))
        while True:
            writer.write({str(number): item(number, (64, 64))})
            os.write(told, number.to_bytes(4, "little"))
            number += 1


def test_killed_at_any_moment_nothing_committed_is_lost(tmp_path: Path):
    landed_inside, committed = 0, set()
    chance = random.Random(0)
    for _ in range(20):
        hear, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_forever(tmp_path, tell)
            finally:
                os._exit(1)
        os.close(tell)
        os.read(hear, 4)  # it is at work
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while os.read(hear, 4):
            pass
        os.close(hear)
        landed_inside += any(tmp_path.glob(".writing-*"))
        found = contents(tmp_path)
        assert not scan(tmp_path).torn
        assert committed <= set(found)
        assert set(found) == {str(number) for number in range(len(found))}
        assert all(found[key] == item(int(key), (64, 64)) for key in set(found) - committed)
        committed = set(found)
    assert landed_inside >= 3, "too few kills landed inside a write to prove anything"
    with Writer(tmp_path):
        assert not list(tmp_path.glob(".writing-*"))


# ---- verify, mend, prune ----


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_no_bit_can_change_unnoticed(tmp_path: Path):
    """100 places at random, headers and data: `verify` names the file, and what is read is right or is refused."""
    luck = random.Random(4)
    whole = {str(number): item(number) for number in range(12)}
    write(tmp_path / "whole", {key: whole[key] for key in map(str, range(8))}, {key: whole[key] for key in "89"})
    (biggest, *_), copy = shard_names(tmp_path / "whole"), tmp_path / "copy"
    for _ in range(100):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", copy)
        name = luck.choice(shard_names(copy))
        flip(copy / name, luck.randrange(8 * (copy / name).stat().st_size))
        assert [damage.file for damage in shards.verify(copy)] == [name]
        reader, read, refused = Reader(copy), 0, 0
        index = scan(copy)
        for key, place in index.items.items():
            try:
                assert bytes(reader.read(place)) == whole[key].data
                read += 1
            except Unusable as error:
                assert error.file == name and error.lost
                refused += 1
        assert refused == 1 or (name in index.torn and not refused), "an item, or the header and with it all items"
    assert shards.verify(tmp_path / "whole") == [] and biggest


def test_verify_counts_files_and_tells_the_items_that_are_lost(tmp_path: Path):
    write(tmp_path, {"a": item(1), "b": item(2)}, {"c": item(3)})
    place, told = scan(tmp_path).items["b"], []
    flip(tmp_path / place.file, 8 * place.offset)
    (damage,) = shards.verify(tmp_path, lambda *event: told.append(event))
    assert (damage.file, damage.items) == (place.file, ("b",)) and "1 of its 2 items" in damage.what
    assert told == [(1, 2), (2, 2)]
    assert shards.verify(tmp_path / "nothing") == []


def test_mending_keeps_what_is_sound_and_sets_the_rest_aside(tmp_path: Path):
    write(tmp_path, {"a": item(1), "b": item(2)._replace(source="of a cat"), "c": item(3)})
    place = scan(tmp_path).items["a"]
    flip(tmp_path / place.file, 8 * place.offset)
    with Writer(tmp_path) as writer:
        assert writer.mend(place.file) == ("a",)
        assert writer.mend(place.file) == (), "it is gone already"
    assert {key: one.data for key, one in contents(tmp_path).items()} == {"b": item(2).data, "c": item(3).data}
    assert shards.sources(tmp_path) == {"b": "of a cat"}
    assert [path.name for path in shards.set_aside(tmp_path)] == [place.file + ".bad"] and not shards.verify(tmp_path)
    with Writer(tmp_path) as writer:
        (name,) = {place.file for place in scan(tmp_path).items.values()}
        assert writer.mend(name) == () and name in shard_names(tmp_path), "a sound one stays"


def test_two_bad_files_of_one_name_are_both_kept(tmp_path: Path):
    write(tmp_path, {"a": item(1)})
    (place,) = scan(tmp_path).items.values()
    for _ in range(2):
        write(tmp_path, {"a": item(1)})
        flip(tmp_path / place.file, 8 * place.offset)
        with Writer(tmp_path) as writer:
            writer.mend(place.file)
    assert [path.name for path in shards.set_aside(tmp_path)] == [f"{place.file}.bad", f"{place.file}.bad1"]


def test_pruning_keeps_what_is_asked_for_and_no_second_copies(tmp_path: Path):
    write(tmp_path, {"a": item(1), "b": item(2)}, {"c": item(3), "d": item(4)}, {"e": item(5)}, {"a": item(1)})
    before = sum((tmp_path / name).stat().st_size for name in shard_names(tmp_path))
    with Writer(tmp_path) as writer:
        pruned = writer.prune(lambda key: key in "acd")
    assert contents(tmp_path) == {"a": item(1), "c": item(3), "d": item(4)} and pruned.items == 2
    assert before - pruned.bytes == sum((tmp_path / name).stat().st_size for name in shard_names(tmp_path))
    assert len(shard_names(tmp_path)) == 2
    with Writer(tmp_path) as writer:
        assert writer.prune(lambda key: True) == (0, 0)
        assert writer.prune(lambda key: False).items == 3 and contents(tmp_path) == {}


def test_a_living_writer_is_seen(tmp_path: Path):
    assert not shards.other_writers(tmp_path)
    with Writer(tmp_path):
        assert shards.other_writers(tmp_path)
    assert not shards.other_writers(tmp_path)


def test_a_second_look_reads_only_what_is_new(tmp_path: Path):
    write(tmp_path, {"a": item(1)}, {"b": item(2)})
    first = scan(tmp_path)
    os.truncate(tmp_path / first.items["a"].file, 3)
    with Writer(tmp_path, torn=()) as writer:
        writer.write({"c": item(3)})
    again = scan(tmp_path, first)
    assert set(again.items) == {"a", "b", "c"} and not again.torn, "known files are taken at their word"
    (tmp_path / first.items["b"].file).unlink()
    assert set(scan(tmp_path, again).items) == {"a", "c"}
    assert set(scan(tmp_path).items) == {"c"}


def test_the_remedy_is_that_of_the_error(tmp_path: Path):
    for number, remedy in ((errno.ENOSPC, "make room on the disk"), (errno.EROFS, "make it writable"),
                           (errno.EDQUOT, "your quota"), (errno.ENOENT, "is gone"), (errno.EIO, "is sound"),
                           (errno.EINVAL, "choose another cache folder")):  # fmt: skip
        with pytest.raises(UserError, match=remedy), shards._told(tmp_path, "written"):
            raise OSError(number, os.strerror(number))
