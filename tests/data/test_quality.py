"""Doubts about captions and sizes, counted and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sana_tune.data.geometry import Box, Placement, Size
from sana_tune.data.quality import enlargement, has_placeholder, is_short, look_at_captions, look_at_shapes
from sana_tune.data.records import Record
from sana_tune.data.survey import DatasetLedger
from tests.data.pictures import record

LEFT_OUT = (
    ("x.png", "there is no caption file x.txt"),
    ("y.png", "is 20x20 px, smaller in area than minimum_image_size 32 (32x32 px)"),
    ("z.png", "its caption is empty"),
)
LEDGER = DatasetLedger("cats", 8, 5, LEFT_OUT)


def captioned(*captions: tuple[str, ...]) -> list[Record]:
    return [record(f"{number}.png", captions=each) for number, each in enumerate(captions)]


def sized(key: str, size: tuple[int, int], resize: tuple[int, int], crop: tuple[int, int] | None = None) -> Record:
    placement = Placement(Size(*resize), Box(0, 0, *(crop or resize)))
    return replace(record(key), width_px=size[0], height_px=size[1], placement=placement)


def test_captions_are_counted_and_named():
    records = captioned(("a", "b"), ("b",), ("",), ("very long",), ("a photo of <TOKEN>", "c"))
    found = look_at_captions(records, LEDGER, {"very long", "another"}, differ=True)
    assert (found.variants, found.empty, found.missing, found.repeated) == (7, 1, 2, 2)
    assert (found.too_long, found.names_too_long) == (1, ("3.png",))
    assert (found.placeholder, found.names_placeholder) == (1, ("4.png",))


def test_a_caption_for_all_is_no_repetition_and_nobody_counted_is_told():
    records = captioned(("b",), ("b",), ("b", "b"))
    assert look_at_captions(records, LEDGER, None, differ=False).repeated == 0
    found = look_at_captions(records, LEDGER, None, differ=True)
    assert (found.repeated, found.too_long) == (3, None)
    assert look_at_captions(captioned(("b", "b")), LEDGER, set(), differ=True).repeated == 0, "a variant twice"
    assert look_at_captions(captioned(("",), ("",)), LEDGER, set(), differ=True).repeated == 0


def test_sizes_are_counted_and_the_worst_is_named_first():
    found = look_at_shapes(
        [
            sized("fine.png", (100, 100), (64, 64)),
            sized("rounded.png", (2000, 1999), (2000, 2000), (1984, 1984)),
            sized("small.png", (50, 40), (75, 60)),
            sized("tiny.png", (10, 10), (64, 64)),
            sized("wide.png", (401, 100), (257, 64), (256, 64)),
            sized("edge.png", (400, 100), (256, 64)),
            sized("tall.png", (100, 900), (64, 576), (64, 64)),
        ]
    )
    assert (found.enlarged, found.largest_factor, found.names_enlarged) == (2, 6.4, ("tiny.png", "small.png"))
    assert (found.extreme, found.names_extreme, found.cropped) == (2, ("wide.png", "tall.png"), 1)
    assert look_at_shapes([]).largest_factor == 1.0


def test_enlargement_is_per_side():
    assert enlargement(sized("a", (100, 50), (200, 101))) == 2.02
    assert enlargement(sized("a", (100, 50), (50, 25))) == 0.5


@pytest.mark.parametrize("text", ["a <token>", "<TOKEN>", "The name of your subject goes here."])
def test_placeholders_are_seen_in_any_case(text):
    assert has_placeholder(text) and not has_placeholder(text[1:-2])


@pytest.mark.parametrize(
    ("prompt", "short"),
    [("a cat", True), ("", True), ("a red zib star", False), ("supercalifragilistic expialidocious", False)],
)
def test_short_prompts(prompt, short):
    assert is_short(prompt) is short
    assert not is_short("青い背景の上に置かれた赤い星の写真、細部まで鮮明に描かれている")
