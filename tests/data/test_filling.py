from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from sana_tune.data.cache import TensorCache
from sana_tune.data.filling import Halving, chunks, fill_latents, fill_text, one_latent, undecodable
from sana_tune.data.images import prepare
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Keys, Record
from sana_tune.data.survey import survey
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.store import FolderStore, StoreLost
from tests.data.pictures import dataset, put

KEYS = Keys("vae", "gemma")


def encode_text(texts: list[str]) -> list[torch.Tensor]:
    return [torch.full((len(text) + 1, 3), float(len(text))) for text in texts]


@dataclass
class Coder:
    """A VAE that keeps every eighth pixel and remembers the batches it got."""

    batches: list[tuple[int, ...]] = field(default_factory=list)
    bad: int | None = None  # number of the picture whose latent is not finite

    def encode(self, pictures: np.ndarray) -> list[torch.Tensor | None]:
        before = sum(batch[0] for batch in self.batches)
        self.batches.append(pictures.shape)
        latents: list[torch.Tensor | None] = [latent_of(picture) for picture in pictures]
        if self.bad is not None and before <= self.bad < before + len(latents):
            latents[self.bad - before] = None
        return latents


def latent_of(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture[::8, ::8].astype(np.float32)).permute(2, 0, 1)


def records_of(folder: Path, **settings) -> tuple[Record, ...]:
    datasets = [dataset(folder, **settings)]
    return survey(datasets, alignment=8, rounding=2, prompt_case="lower", memory=FileMemory()).records


def fill(folder: Path, records, cache: TensorCache, coder: Coder, batch_size: int = 4, report=lambda *_: None):
    store = FolderStore(folder)
    return fill_latents(records, cache, KEYS, lambda r: store.read(r.key), coder.encode, batch_size, report)


# ---- text ----


def test_captions_are_encoded_once_and_never_again(tmp_path: Path):
    captions = {KEYS.text(text): text for text in ("", "a", "bb", "ccc", "dddd")}
    told: list[tuple[int, int]] = []
    made = fill_text(TensorCache(tmp_path), captions, encode_text, 2, lambda *event: told.append(event))
    assert made == 5 and told == [(0, 5), (2, 5), (4, 5), (5, 5)]
    cache = TensorCache(tmp_path)
    assert all(torch.equal(cache.get(key), encode_text([text])[0]) for key, text in captions.items())
    assert fill_text(cache, captions, lambda texts: pytest.fail("encoded again"), 2, lambda *_: None) == 0


def test_what_was_encoded_before_a_failure_stays(tmp_path: Path):
    captions = {KEYS.text(text): text for text in "abcdef"}

    def encode(texts: list[str]) -> list[torch.Tensor]:
        if "e" in texts:
            raise KeyboardInterrupt
        return encode_text(texts)

    with pytest.raises(KeyboardInterrupt):
        fill_text(TensorCache(tmp_path), captions, encode, 2, lambda *_: None)
    assert len(TensorCache(tmp_path)) == 4


# ---- pictures ----


def test_pictures_are_encoded_in_batches_of_one_size(tmp_path: Path):
    for number in range(5):
        put(tmp_path / "data", f"{number}.png", 64, 64, seed=number)
    for number in range(5, 8):
        put(tmp_path / "data", f"{number}.png", 96, 48, seed=number)
    records, coder, cache = records_of(tmp_path / "data"), Coder(), TensorCache(tmp_path / "cache")
    told: list[tuple[int, int]] = []
    assert fill(tmp_path / "data", records, cache, coder, 4, lambda *event: told.append(event)) == {}
    assert coder.batches == [(4, 64, 64, 3), (1, 64, 64, 3), (3, 48, 88, 3)]
    assert told == [(0, 8), (4, 8), (5, 8), (8, 8)]
    for record in records:
        picture = prepare((tmp_path / "data" / record.key).read_bytes(), record.placement)
        assert torch.equal(cache.get(KEYS.latent(record)), latent_of(picture))


def test_a_second_run_encodes_nothing_and_an_edit_encodes_itself(tmp_path: Path):
    for number in range(4):
        put(tmp_path / "data", f"{number}.png", seed=number)
    fill(tmp_path / "data", records_of(tmp_path / "data"), TensorCache(tmp_path / "cache"), Coder())
    again = Coder()
    fill(tmp_path / "data", records_of(tmp_path / "data"), TensorCache(tmp_path / "cache"), again)
    assert again.batches == []
    put(tmp_path / "data", "2.png", seed=77)
    fill(tmp_path / "data", records_of(tmp_path / "data"), TensorCache(tmp_path / "cache"), again)
    assert [batch[0] for batch in again.batches] == [1]


def test_equal_pictures_are_encoded_once(tmp_path: Path):
    for name in "abc":
        put(tmp_path / "data", f"{name}.png", seed=1)
    records, coder, cache = records_of(tmp_path / "data"), Coder(), TensorCache(tmp_path / "cache")
    fill(tmp_path / "data", records, cache, coder)
    assert [batch[0] for batch in coder.batches] == [1] and len(cache) == 1 and len(records) == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "harm, reason",
    [
        (Path.unlink, "cannot be read"),
        (cut, "was changed after the run had looked at it"),
        (lambda path: put(path.parent, path.name, seed=9), "was changed after the run had looked at it"),
    ],
)
def test_pictures_that_went_bad_are_left_out_with_their_reason(tmp_path: Path, harm: Callable, reason: str):
    for number in range(3):
        put(tmp_path / "data", f"{number}.png", seed=number)
    records, cache = records_of(tmp_path / "data"), TensorCache(tmp_path / "cache")
    harm(tmp_path / "data" / "1.png")
    broken = fill(tmp_path / "data", records, cache, Coder())
    assert list(broken) == ["cats/1.png"] and reason in broken["cats/1.png"]
    assert len(cache) == 2


def test_a_body_that_is_torn_shows_when_it_is_encoded(tmp_path: Path):
    for number in range(2):
        cut(put(tmp_path / "data", f"{number}.png", seed=5))  # equal files: both are told
    put(tmp_path / "data", "good.png")
    records, coder, cache = records_of(tmp_path / "data"), Coder(), TensorCache(tmp_path / "cache")
    assert len(records) == 3
    broken = fill(tmp_path / "data", records, cache, coder)
    assert set(broken) == {"cats/0.png", "cats/1.png"} and all("is damaged" in why for why in broken.values())
    assert len(cache) == 1 and [batch[0] for batch in coder.batches] == [1]


def test_a_batch_of_broken_pictures_alone_never_reaches_the_encoder(tmp_path: Path):
    cut(put(tmp_path / "data", "a.png"))
    coder = Coder()
    broken = fill(tmp_path / "data", records_of(tmp_path / "data"), TensorCache(tmp_path / "cache"), coder)
    assert list(broken) == ["cats/a.png"] and coder.batches == []


def test_latents_that_are_not_finite_are_left_out_and_not_cached(tmp_path: Path):
    for number in range(5):
        put(tmp_path / "data", f"{number}.png", seed=number)
    records, cache = records_of(tmp_path / "data"), TensorCache(tmp_path / "cache")
    assert fill(tmp_path / "data", records, cache, Coder(bad=3), 2) == {"cats/3.png": "its latent is not finite"}
    assert cache.missing(map(KEYS.latent, records)) == [KEYS.latent(records[3])]


def test_chunks():
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 2)) == []


# ---- a device without room ----


class Small:
    """A device that has room for so many items at once; each is answered as itself."""

    def __init__(self, room: int):
        self.room = room
        self.sizes: list[int] = []
        self.relieved = 0

    def __call__(self, batch) -> list:
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("no room")
        return list(batch)

    def relieve(self) -> None:
        self.relieved += 1


def test_batches_are_halved_until_they_fit_and_stay_so(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    device = Small(room=3)
    encode = Halving(device, "captions", device.relieve)
    with caplog.at_level("WARNING", "sana_tune"):
        assert encode(list("abcdefgh")) == list("abcdefgh")
        assert encode(list("ijk")) == list("ijk")
    assert device.sizes == [8, 4, 2, 2, 2, 2, 2, 1] and device.relieved == 2
    told = {id(record) for record in caplog.records if "do not fit into the device's memory" in record.getMessage()}
    assert len(told) == 1


def test_pictures_are_split_along_their_batch(tmp_path: Path):
    for number in range(5):
        put(tmp_path / "data", f"{number}.png", 64, 64, seed=number)
    records, coder, cache = records_of(tmp_path / "data"), Coder(), TensorCache(tmp_path / "cache")

    def encode(pictures: np.ndarray) -> list[torch.Tensor | None]:
        if len(pictures) > 2:
            raise torch.OutOfMemoryError("no room")
        return coder.encode(pictures)

    store = FolderStore(tmp_path / "data")
    read = lambda record: store.read(record.key)  # noqa: E731
    assert fill_latents(records, cache, KEYS, read, Halving(encode, "pictures"), 5, lambda *_: None) == {}
    assert [batch[0] for batch in coder.batches] == [2, 2, 1] and not cache.missing(map(KEYS.latent, records))


def test_when_not_even_one_fits_that_is_told_and_what_was_made_stays(tmp_path: Path):
    with pytest.raises(UserError, match=r"encode pictures of 32x16 px, not even one"):
        Halving(Small(0), "pictures")(np.zeros((2, 16, 32, 3), np.uint8))
    captions = {KEYS.text(text): text for text in "abcd"}

    def encode(texts: list[str]) -> list[torch.Tensor]:
        if "c" in texts:
            raise torch.OutOfMemoryError("no room")
        return encode_text(texts)

    with pytest.raises(UserError, match="there is no room in the device's memory to encode captions, not even one"):
        fill_text(TensorCache(tmp_path), captions, Halving(encode, "captions"), 2, lambda *_: None)
    assert len(TensorCache(tmp_path)) == 2


# ---- several at work ----


def test_what_another_process_made_meanwhile_is_not_made_again(tmp_path: Path):
    captions = {KEYS.text(text): text for text in "abcdef"}
    encoded: list[str] = []

    def encode(texts: list[str]) -> list[torch.Tensor]:
        encoded.extend(texts)
        if encoded == ["a", "b"]:  # by the time this batch is done, another process has done the next two
            others = {key: text for key, text in captions.items() if text in "cd"}
            TensorCache(tmp_path).fill((key, encode_text([text])[0]) for key, text in others.items())
        return encode_text(texts)

    told: list[tuple[int, int]] = []
    assert fill_text(TensorCache(tmp_path), captions, encode, 2, lambda *event: told.append(event)) == 4
    assert encoded == ["a", "b", "e", "f"] and told[-1] == (6, 6)
    assert len(TensorCache(tmp_path)) == 6


def test_beside_another_writer_the_order_is_ones_own(tmp_path: Path):
    captions = {KEYS.text(str(number)): str(number) for number in range(40)}
    orders: list[list[str]] = []
    for cache in (TensorCache(tmp_path / "alone"), TensorCache(tmp_path / "beside")):
        order: list[str] = []

        def encode(texts: list[str], order: list[str] = order) -> list[torch.Tensor]:
            order.extend(texts)
            return encode_text(texts)

        with TensorCache(tmp_path / "beside").writer():
            fill_text(cache, captions, encode, 1, lambda *_: None)
        orders.append(order)
    assert orders[0] == list(captions.values()) and orders[1] != orders[0] and sorted(orders[1]) == sorted(orders[0])


# ---- one by one, and not at all ----


def test_one_latent_is_as_in_a_batch_and_its_faults_are_told(tmp_path: Path):
    put(tmp_path / "data", "good.png", seed=3)
    cut(put(tmp_path / "data", "torn.png", seed=4))
    good, torn = records_of(tmp_path / "data")
    store = FolderStore(tmp_path / "data")
    read = lambda record: store.read(record.key)  # noqa: E731
    picture = prepare(store.read("good.png"), good.placement)
    assert torch.equal(one_latent(good, read, Coder().encode), latent_of(picture))
    with pytest.raises(UserError, match=r"cats/torn.png: this picture cannot be encoded: is damaged"):
        one_latent(torn, read, Coder().encode)
    with pytest.raises(UserError, match="its latent is not finite"):
        one_latent(good, read, Coder(bad=0).encode)


def test_pictures_that_cannot_be_decoded_are_found_without_an_encoder(tmp_path: Path):
    for number in range(20):
        path = put(tmp_path / "data", f"{number:02}.png", seed=number)
        if number in (3, 17):
            cut(path)
    records, store, told = records_of(tmp_path / "data"), FolderStore(tmp_path / "data"), []
    broken, sound = undecodable(records, lambda record: store.read(record.key), lambda *event: told.append(event))
    assert set(broken) == {"cats/03.png", "cats/17.png"} and all("is damaged" in why for why in broken.values())
    assert len(sound) == 18 and told[-1] == (20, 20)


def test_a_folder_that_vanishes_ends_it_and_leaves_out_nothing(tmp_path: Path):
    for number in range(6):
        put(tmp_path / "data", f"{number}.png", seed=number)
    records, cache, coder = records_of(tmp_path / "data"), TensorCache(tmp_path / "cache"), Coder()

    def told(done: int, total: int) -> None:
        if done == 2:
            (tmp_path / "data").rename(tmp_path / "elsewhere")

    store = FolderStore(tmp_path / "data")

    def read(record: Record) -> bytes:
        if record.key == "5.png":  # the last batch comes after that
            deadline = time.monotonic() + 5
            while (tmp_path / "data").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
        return store.read(record.key)

    with pytest.raises(StoreLost, match="was there and is gone now"):
        fill_latents(records, cache, KEYS, read, coder.encode, 2, told)
    assert len(TensorCache(tmp_path / "cache")) >= 2, "what was made stays"
