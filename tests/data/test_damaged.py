"""Files that are no usable pictures: each is named with its reason, the rest is trained; with `strict` nothing is."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Keys
from sana_tune.data.survey import Survey, survey
from tests.data.pictures import dataset, encoded, noise, put
from tests.data.test_images import chunk

BOMB_HEADER = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", BOMB_HEADER) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6))
DAMAGED = {
    "bomb.png": (BOMB, "is 60000x60000 px; at most 537 megapixels are read"),
    "empty.jpg": (b"", "is an empty file"),
    "page.jpg": (b"<!DOCTYPE html><html>not found", "is a web page"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture"),
    "text.webp": (b"hello", "is not a picture that can be read"),
    "torn.jpg": (encoded(noise(64, 64), "JPEG")[:40], "is damaged"),
    "torn.png": (encoded(noise(64, 64))[:20], "is damaged"),
}


def look(*datasets, **settings) -> Survey:
    settings = {"alignment": 8, "rounding": 2, "prompt_case": "lower", "memory": FileMemory(), **settings}
    return survey(datasets, **settings)


def damaged(folder: Path) -> Path:
    put(folder, "good.png")
    put(folder, "wrong_ending.jpg", seed=1)  # a PNG inside
    for name, (data, _) in DAMAGED.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("headers_only", [True, False])
def test_each_damaged_file_is_named_and_the_rest_is_trained(tmp_path: Path, headers_only: bool):
    found = look(dataset(damaged(tmp_path)), headers_only=headers_only)
    assert not found.problems and found.ledger.balances()
    assert [record.key for record in found.records] == ["good.png", "wrong_ending.jpg"]
    told = dict(found.ledger.datasets[0].left_out)
    assert set(told) == set(DAMAGED)
    for name, (_, reason) in DAMAGED.items():
        assert told[name].startswith(reason), (name, told[name])


def test_a_picture_of_a_hundred_megapixels_is_trained(tmp_path: Path):
    """120 megapixels of black in 15 kB: above Pillow's first limit, and no attack."""
    header = struct.pack(">IIBBBBB", 12_000, 10_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (1501 * 10_000))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "large.png").write_bytes(png)
    found = look(dataset(tmp_path))
    assert [(record.width_px, record.height_px) for record in found.records] == [(12_000, 10_000)]


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path: Path):
    """Videos, sound, archives and PDFs are no pictures; what notebooks, wastebaskets and macOS hide is left alone."""
    put(tmp_path, "a.png")
    for name in ("clip.mp4", "song.flac", "b.pdf", "c.zip", "Thumbs.db", "data.parquet", "a.png.json"):
        (tmp_path / name).write_bytes(b"x")
    for name in (".ipynb_checkpoints/a.png", ".Trash-1000/b.png", ".DS_Store", "._a.png", "sub/.git/c.png"):
        put(tmp_path, name)
    found = look(dataset(tmp_path))
    (ledger,) = found.ledger.datasets
    assert [record.key for record in found.records] == ["a.png"]
    assert (ledger.found, ledger.not_pictures, ledger.left_out) == (1, 7, ())


# ---- strict ----


@pytest.mark.parametrize("headers_only", [True, False])
def test_with_strict_damage_is_a_problem_that_lists_them(tmp_path: Path, headers_only: bool):
    found = look(dataset(damaged(tmp_path)), strict=True, headers_only=headers_only)
    (problem,) = found.problems
    assert problem.where == f"dataset cats: {tmp_path}"
    assert problem.what.startswith("strict is on, and 7 pictures would be left out: bomb.png: is 60000x60000 px")
    assert all(f"{name}: " in problem.what for name in DAMAGED)
    assert "`sana_tune check --left-out`" in problem.fix and found.ledger.balances()


def test_with_strict_so_is_a_missing_caption_even_if_such_are_skipped(tmp_path: Path):
    put(tmp_path, "a.png", caption="a cat")
    put(tmp_path, "b.png", seed=1)
    entry = {"caption_strategy": "textfile"}
    (problem,) = look(dataset(tmp_path, missing_caption="skip", **entry), strict=True).problems
    assert "1 picture would be left out: b.png: there is no caption file b.txt" in problem.what
    (problem,) = look(dataset(tmp_path, **entry), strict=True).problems
    assert "every picture needs a caption" in problem.what, "told once, as without strict"
    assert not look(dataset(tmp_path, missing_caption="empty", **entry), strict=True).problems


def test_with_strict_what_a_setting_leaves_out_is_no_problem(tmp_path: Path):
    put(tmp_path, "a.png", 100, 100)
    put(tmp_path, "small.png", 20, 20)
    found = look(dataset(tmp_path, minimum_image_size=50), strict=True)
    assert not found.problems and len(found.records) == 1 and len(found.ledger.datasets[0].left_out) == 1


def test_of_many_the_first_twenty_are_named(tmp_path: Path):
    put(tmp_path, "good.png")
    for number in range(31):
        (tmp_path / f"{number:02}.jpg").touch()
    (problem,) = look(dataset(tmp_path), strict=True).problems
    assert "31 pictures would be left out" in problem.what and "19.jpg" in problem.what
    assert "20.jpg" not in problem.what and problem.what.endswith("; and 11 more")


# ---- filters, shuffles and the ground below transparent parts, by dataset ----


def test_filters_are_those_of_the_datasets_text_cache(tmp_path: Path):
    put(tmp_path, "a red cat.png")
    found = look(dataset(tmp_path, "one"), dataset(tmp_path, "two"), filters={"two": ("red ",)})
    assert [record.captions for record in found.records] == [("a red cat",), ("a cat",)]


def test_shuffles_are_the_datasets(tmp_path: Path):
    put(tmp_path, "one, two, three.png")
    entry = dataset(tmp_path, caption_shuffle={"enable": True, "count": 2})
    (record,) = look(entry).records
    assert record.captions[0] == "one, two, three" and len(set(record.captions)) == 3
    assert look(entry, seed=9).records[0].captions == record.captions, "the run's seed changes no caption"


def test_only_pictures_with_transparent_parts_depend_on_the_ground(tmp_path: Path):
    """A picture without any keeps its latent whatever the ground is; so does every picture on white."""
    put(tmp_path, "opaque.png")
    (tmp_path / "alpha.png").write_bytes(encoded(noise(40, 30, 3, channels=4)))
    memory = FileMemory()

    def keys(**settings) -> dict[str, str]:
        records = look(dataset(tmp_path, **settings), memory=memory).records
        return {record.key: Keys("vae", "text").latent(record) for record in records}

    white, grey, red = keys(), keys(alpha_ground="grey"), keys(alpha_ground="#ff0000")
    assert white == keys(alpha_ground="white") == keys(alpha_ground="#FFF")
    assert white["opaque.png"] == grey["opaque.png"] == red["opaque.png"]
    assert len({white["alpha.png"], grey["alpha.png"], red["alpha.png"]}) == 3


def test_what_was_remembered_before_transparency_was_is_looked_at_again(tmp_path: Path):
    path = tmp_path / "pictures" / "a.png"
    path.parent.mkdir()
    path.write_bytes(encoded(np.zeros((30, 40, 4), np.uint8)))
    memory = FileMemory(tmp_path / "files.jsonl")
    look(dataset(path.parent), memory=memory)
    text = memory.path.read_text()
    assert '"alpha":true' in text
    memory.path.write_text(text.replace(',"alpha":true', "").replace('"alpha":true,', ""))
    (record,) = look(dataset(path.parent, alpha_ground="black"), memory=FileMemory(memory.path)).records
    assert record.ground == "#000000"


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_text_is_left_out(tmp_path: Path):
    put(tmp_path, "good.png")
    os.rename(put(tmp_path, "x.png", seed=1), os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    found = look(dataset(tmp_path), strict=True)
    assert "caf\\udce9.png: has a name that is not UTF-8" in found.problems[0].what
