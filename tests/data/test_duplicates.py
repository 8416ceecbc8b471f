"""Pictures read whole: torn ones, equal files, copies that only look the same; each file once, and remembered."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_tune.data.duplicates import Picture, groups_alike, look_at_all, looks_of
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import content_hash
from sana_tune.store import FolderStore
from tests.data.pictures import encoded, noise, put


def pictures(folder: Path, dataset: str = "cats") -> list[Picture]:
    store = FolderStore(folder)
    return [Picture(f"{dataset}/{entry.key}", store, entry.key) for entry in store.list() if ".txt" not in entry.key]


def write(path: Path, image: Image.Image, format: str = "PNG", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, format, **options))


def photo(seed: int, side: int = 256) -> Image.Image:
    """Noise with the spectrum of photographs (1/f)."""
    chosen = np.random.default_rng(seed)
    across, down = np.fft.fftfreq(side)[None], np.fft.fftfreq(side)[:, None]
    noise = chosen.normal(size=(side, side)) + 1j * chosen.normal(size=(side, side))
    waves = np.fft.ifft2(noise / np.maximum(np.hypot(across, down), 1 / side)).real
    return Image.fromarray(((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8)).convert("RGB")


def saved_again(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


# ---- looks ----


def test_copies_look_the_same_and_other_pictures_do_not():
    for seed in range(10):
        original = photo(seed)
        looks = looks_of(original)
        copies = {
            "smaller": original.resize((90, 60)),
            "brighter": original.point(lambda value: min(255, int(value * 1.08))),
            "grey": original.convert("L"),
            "saved again": saved_again(original, 60),
            "small and saved again": saved_again(original.resize((128, 128)), 75),
        }
        far = {name: bits(looks, looks_of(copy)) for name, copy in copies.items()}
        assert 0 <= looks < 2**64 and max(far.values()) <= 6, far
        others = [photo(other) for other in range(seed + 1, 20)]
        assert min(bits(looks, looks_of(other)) for other in others) > 12
        assert bits(looks, looks_of(original.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 12


def test_flat_pictures_are_alike_whatever_their_colour():
    assert {looks_of(Image.new("RGB", (50, 40), colour)) for colour in ("white", "black", (17, 99, 200))} == {0}


# ---- groups ----


def slow_groups(looks: dict[str, int], most: int) -> set[frozenset[str]]:
    """The same by comparing all with all."""
    groups = [{name} for name in looks]
    for one in looks:
        for other in looks:
            if bits(looks[one], looks[other]) <= most:
                first, second = (next(group for group in groups if name in group) for name in (one, other))
                if first is not second:
                    groups.remove(second)
                    first |= second
    return {frozenset(group) for group in groups if len(group) > 1}


@pytest.mark.parametrize("most", [0, 1, 6, 7])
def test_groups_are_those_of_comparing_all_with_all(most):
    chosen = random.Random(most)
    looks = {f"p{n}": chosen.getrandbits(64) for n in range(60)}
    for n in range(60):  # copies with up to nine bits turned, anywhere
        turned = sum(1 << bit for bit in chosen.sample(range(64), chosen.randrange(10)))
        looks[f"copy{n}"] = looks[f"p{n}"] ^ turned
    found = groups_alike(looks, most)
    assert {frozenset(group) for group in found} == slow_groups(looks, most) and found
    assert all(list(group) == sorted(group, key=list(looks).index) for group in found)


def test_groups_of_nothing_and_of_too_many_bits():
    assert groups_alike({}) == groups_alike({"a": 5}) == ()
    assert groups_alike({"a": 5, "b": 5}) == (("a", "b"),)
    with pytest.raises(ValueError, match="0 to 7"):
        groups_alike({"a": 1}, 8)


def test_ten_thousand_are_grouped_quickly():
    numbers = np.random.default_rng(0).integers(0, 2**63, 10_000, dtype=np.uint64)
    looks = {str(n): int(value) for n, value in enumerate(numbers)}
    looks |= {f"near{n}": int(numbers[n]) ^ 0b1001 << n % 60 for n in range(500)}
    begin = time.thread_time()
    assert len(groups_alike(looks)) == 500
    assert time.thread_time() - begin < 15
    frames = {str(n): 0xAAAA_AAAA_AAAA_0000 | n for n in range(1500)}  # a film: all of them share three bands
    begin = time.thread_time()
    assert len(groups_alike(frames)) == 1
    assert time.thread_time() - begin < 30


# ---- files ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    put(place, "a.png", 120, 90, seed=1)
    write(place / "b.png", photo(2))
    (place / "again.png").write_bytes((place / "a.png").read_bytes())
    write(place / "small.jpg", photo(2).resize((60, 60)), "JPEG", quality=80)
    torn = encoded(noise(200, 200, seed=3), "JPEG", quality=95)
    (place / "torn.jpg").write_bytes(torn[: len(torn) // 2])
    return place


def test_torn_same_and_alike(folder):
    told: list[tuple[int, int]] = []
    found = look_at_all(pictures(folder), FileMemory(), lambda *event: told.append(event))
    assert found.pictures == 5 and told == [(5, 5)]
    assert list(found.broken) == ["cats/torn.jpg"] and "truncated" in found.broken["cats/torn.jpg"]
    assert found.same == (("cats/a.png", "cats/again.png"),)
    assert found.alike == (("cats/b.png", "cats/small.jpg"),)


def test_a_file_of_two_datasets_is_one_file(folder):
    found = look_at_all([*pictures(folder), *pictures(folder, "dogs")], FileMemory())
    assert found.pictures == 5 and found.same == (("cats/a.png", "cats/again.png"),)


def test_the_second_time_nothing_is_read(folder, tmp_path, monkeypatch):
    memory = tmp_path / "cache" / "files.jsonl"
    first = look_at_all(pictures(folder), FileMemory(memory))
    assert memory.is_file()
    read: list[str] = []
    plain = FolderStore.read
    monkeypatch.setattr(FolderStore, "read", lambda store, key: read.append(key) or plain(store, key))
    assert look_at_all(pictures(folder), FileMemory(memory)) == first and read == []
    put(folder, "b.png", 110, 90, seed=9)
    assert look_at_all(pictures(folder), FileMemory(memory)).alike == () and read == ["b.png"]


def test_what_was_known_of_a_file_stays_known(folder):
    memory = FileMemory()
    (picture,) = [picture for picture in pictures(folder) if picture.key == "a.png"]
    entry = next(entry for entry in picture.store.list() if entry.key == "a.png")
    memory.put(picture.path, entry, {"width": 120, "height": 90})
    look_at_all([picture], memory)
    facts = memory.get(picture.path, entry)
    assert facts is not None and facts["width"] == 120
    assert facts["hash"] == content_hash((folder / "a.png").read_bytes())


def test_a_picture_that_is_gone_is_told(folder):
    found = pictures(folder)
    (folder / "a.png").unlink()
    assert look_at_all(found, FileMemory()).broken["cats/a.png"].startswith("cannot be read: ")


def test_what_was_seen_before_an_interruption_is_kept(folder, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    memory = tmp_path / "files.jsonl"
    with pytest.raises(KeyboardInterrupt):
        look_at_all(pictures(folder), FileMemory(memory), stop)
    assert memory.read_text(encoding="utf-8").count("looks") == 4
