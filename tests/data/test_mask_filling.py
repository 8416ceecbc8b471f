"""Masks in the caches: the very crop of their pictures, made once, and what is broken is told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sana_tune.data.cache import LostItem, TensorCache
from sana_tune.data.geometry import Chance, Rules, Size, place
from sana_tune.data.images import mask_grid, prepare
from sana_tune.data.mask_filling import Masks, fill_masks
from sana_tune.data.notes import in_words
from sana_tune.data.records import Keys, Record, content_hash
from sana_tune.data.shards import sources
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from tests.data.pictures import encoded, record

KEYS = Keys("vae", "gemma")


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    log.addHandler(caplog.handler)
    yield
    log.removeHandler(caplog.handler)


def silent(done: int, total: int) -> None:
    pass


def masked(name: str, data: bytes) -> Record:
    return replace(record(name), mask_key=name, mask_hash=content_hash(data))


def half(seed: int = 0) -> bytes:
    """White on the left, and a dot that tells it from others."""
    levels = np.zeros((64, 64), np.uint8)
    levels[:, :32], levels[0, 63] = 255, seed
    return encoded(levels)


def test_masks_are_made_once_and_kept_beside_the_latents(tmp_path: Path):
    data = {f"{n}.png": half(n) for n in range(3)}
    records = [masked(name, each) for name, each in data.items()]
    reads: list[str] = []

    def read(one: Record) -> bytes:
        reads.append(str(one.mask_key))
        return data[str(one.mask_key)]

    told: list[tuple[int, int]] = []
    cache = TensorCache(tmp_path)
    cache.fill([(KEYS.latent(records[0]), torch.zeros(4))])
    assert fill_masks([*records, record("plain.png")], cache, KEYS, read, 8, lambda *now: told.append(now)) == {}
    assert sorted(reads) == sorted(data) and told[-1] == (3, 3) and len(cache) == 4
    assert fill_masks(records, TensorCache(tmp_path), KEYS, read, 8, silent) == {} and len(reads) == 3
    expected = torch.zeros(1, 8, 8)
    expected[..., :4] = 1
    of = Masks({"cats": TensorCache(tmp_path)}, {"cats": read}, KEYS, 8).of
    torch.testing.assert_close(of(records[0]), expected)
    assert len(reads) == 3, "read from the cache"
    assert in_words(sources(tmp_path)[KEYS.mask(records[1])], "key") == "the mask 1.png"


def test_what_is_not_kept_is_looked_at_and_made_on_the_spot(tmp_path: Path):
    good, torn = masked("good.png", half()), masked("torn.png", half(1)[:-40])
    data = {"good.png": half(), "torn.png": half(1)[:-40]}
    read = lambda one: data[str(one.mask_key)]  # noqa: E731
    broken = fill_masks([good, torn], None, KEYS, read, 8, silent)
    assert set(broken) == {"cats/torn.png"} and "its mask torn.png is damaged" in broken["cats/torn.png"]
    of = Masks({"cats": TensorCache(tmp_path)}, {"cats": read}, KEYS, 8).of
    assert of(good).shape == (1, 8, 8) and not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(UserError, match=r"its mask torn\.png is damaged"):
        of(torn)


def test_masks_that_cannot_be_read_are_told_and_the_others_kept(tmp_path: Path):
    def read(one: Record) -> bytes:
        if one.mask_key == "gone.png":
            raise UserError(Problem("gone.png", "is gone", "bring it back"))
        return half(9 if one.mask_key == "changed.png" else 0)

    records = [masked(name, half(seed)) for seed, name in enumerate(("good.png", "gone.png", "changed.png"))]
    cache = TensorCache(tmp_path)
    broken = fill_masks(records, cache, KEYS, read, 8, silent)
    assert broken == {
        "cats/gone.png": "its mask gone.png: is gone",
        "cats/changed.png": "its mask changed.png was changed after the run had looked at it; start again",
    }
    assert len(cache) == 1


def test_black_masks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    black = encoded(np.zeros((64, 64), np.uint8))
    with caplog.at_level(logging.WARNING, log.name):
        fill_masks([masked("dark.png", black)], TensorCache(tmp_path), KEYS, lambda one: black, 8, silent)
    assert "masks of 1 pictures are black where they are trained: nothing counts: cats/dark.png" in caplog.text


def test_a_damaged_mask_is_told_as_a_lost_item(tmp_path: Path):
    one = masked("a.png", half())
    cache = TensorCache(tmp_path)
    fill_masks([one], cache, KEYS, lambda _: half(), 8, silent)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 255
    shard.write_bytes(data)
    masks = Masks({"cats": cache}, {"cats": lambda _: half()}, KEYS, 8)
    with pytest.raises(LostItem) as lost:
        masks.of(one)
    cache.mend(lost.value)
    assert masks.of(one).mean() == pytest.approx(0.5), "made on the spot, as long as it is not there"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(64, 200), st.integers(64, 200), st.sampled_from(["center", "corner", "random"]),
    st.sampled_from(["square", "preserve"]), st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
def test_a_mask_is_cropped_where_its_picture_is(width, height, style, aspect, crop, seed):
    """The picture is its own mask, in soft shapes: after resizing and cropping, both show the same places."""
    rules = Rules(
        resolution=64, resolution_type="pixel_area", crop=crop, crop_style=style, crop_aspect=aspect,
        crop_aspect_buckets=(), alignment=8, rounding=2,
    )  # fmt: skip
    chance = Chance(seed * 2654435761 % 2**32, seed * 40503 % 2**32, seed * 7919 % 2**32)
    small = np.random.default_rng(seed).integers(0, 2, (5, 5), dtype=np.uint8) * 255
    levels = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    placed = place(Size(width, height), rules, chance)
    picture = prepare(encoded(np.stack([levels] * 3, axis=-1)), placed)[..., 0].astype(np.float64) / 255
    tall, wide = picture.shape
    expected = picture.reshape(tall // 8, 8, wide // 8, 8).mean(axis=(1, 3))
    found = mask_grid(encoded(levels), placed, "mask", 8)
    assert found.shape == expected.shape and np.abs(found - expected).max() < 0.06
