"""The lines beside cached items say what they were made of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sana_tune.data.notes import in_words, is_of_caption, latent_note, mask_note, read_latent_note, text_note
from sana_tune.data.records import Keys
from tests.data.pictures import record

KEYS = Keys("vae", "gemma")


@pytest.mark.parametrize("key", ["cats/a.png", "a b.png", "a\tb.png"])
@pytest.mark.parametrize("ground", [None, "#ff0000"])
def test_a_latents_line_is_read_back(key, ground):
    note = latent_note(replace(record(key), ground=ground, content_hash="abc"), KEYS)
    assert note == note.rstrip(), "a shard strips what is at its end"
    read = read_latent_note(note)
    assert read is not None
    assert (read.key, read.content_hash, read.encoder, read.ground) == (key, "abc", "vae", ground or "")
    assert (read.resize, read.crop_box) == ("64x64", "0,0,64,64")
    assert in_words(note, "k") == key


def test_a_texts_line_knows_its_caption_and_holds_none_of_it():
    note = text_note("a cat", "gemma")
    assert is_of_caption(note, "a cat") and not is_of_caption(note, "a dog") and "cat" not in note
    assert is_of_caption(text_note("a cat", "another"), "a cat")
    assert read_latent_note(note) is None and in_words(note, "k") == "k"


def test_a_masks_line_names_the_mask():
    one = replace(record("a.png"), mask_key="m/a\tb.png", mask_hash="abc")
    assert in_words(mask_note(one, KEYS), "k") == "the mask m/a\tb.png"
    assert read_latent_note(mask_note(one, KEYS)) is None


@pytest.mark.parametrize("line", ["", "latent", "latent\ta\tb", "mask\ta"])
def test_other_lines_say_nothing(line):
    assert read_latent_note(line) is None and in_words(line, "k") == "k"
