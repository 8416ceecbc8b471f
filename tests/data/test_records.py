from __future__ import annotations

from dataclasses import replace

import pytest

from sana_tune.data import records
from sana_tune.data.geometry import Box, Chance, Placement, Size
from sana_tune.data.records import Keys, chance_of, digest
from tests.data.pictures import record


def test_digests_are_fixed():
    """A key must mean the same tomorrow, or every cache is lost."""
    assert digest("a", 1, 0.5, ["ü"]) == digest("a", 1, 0.5, ["ü"]) != digest("a1", 0.5, ["ü"])
    assert len(digest("a")) == 32
    assert Keys("vae", "text").text("a cat") == "5fcb9c2e8e1d9fc32d91b82bfd746731"
    assert Keys("vae", "text").latent(record("a.png")) == "f7a4608cb2cf8bcadafb8ba0c861fe99"


def test_a_latent_depends_on_content_placement_and_encoder_alone():
    keys, one = Keys("vae", "text"), record("a.png")
    same = replace(one, dataset="dogs", key="b.png", captions=("x",), width_px=1)
    assert keys.latent(one) == keys.latent(same)
    others = [
        keys.latent(replace(one, content_hash="other")),
        keys.latent(replace(one, placement=Placement(Size(64, 65), Box(0, 0, 64, 64)))),
        keys.latent(replace(one, placement=Placement(Size(64, 64), Box(0, 0, 64, 32)))),
        Keys("vae2", "text").latent(one),
        keys.text("hash of a.png"),
    ]
    assert len({keys.latent(one), *others}) == 1 + len(others)


def test_a_latent_depends_on_how_pictures_are_decoded(monkeypatch: pytest.MonkeyPatch):
    before = Keys("vae", "text").latent(record("a.png"))
    monkeypatch.setattr(records, "DECODING", records.DECODING + 1)
    assert Keys("vae", "text").latent(record("a.png")) != before


def test_a_latent_depends_on_the_ground_of_transparent_parts_where_there_are_any():
    keys, one = Keys("vae", "text"), record("a.png")
    grounds = [keys.latent(replace(one, ground=ground)) for ground in (None, "#000000", "#ff0000")]
    assert len(set(grounds)) == 3 and grounds[0] == keys.latent(one)


def test_a_picture_that_was_never_hashed_has_no_key():
    with pytest.raises(ValueError, match=r"cats/a\.png was never hashed"):
        Keys("vae", "text").latent(replace(record("a.png"), content_hash=None))


def test_chance_is_fixed():
    """Or every random crop moves, and its latent is made again."""
    assert chance_of(42, "cats", "a/ü.png") == Chance(aspect=1477872771, left=3125728400, top=1646065097)


def test_a_text_key_depends_on_caption_and_encoder_alone():
    texts = [Keys(vae, text).text(caption) for vae in "ab" for text in "ab" for caption in ("", "x")]
    assert len(set(texts)) == 4


def test_ids_name_dataset_and_key():
    assert record("a/b.png").id == "cats/a/b.png"
