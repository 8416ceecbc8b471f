from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest

from sana_tune.config.caption_edits import CaptionShuffle
from sana_tune.data.variants import shuffled

CAPTION = "a red cat, on a mat, at night, in Rome, photograph"
PARTS = CAPTION.split(", ")


def test_variants_are_other_orders_of_the_same_parts():
    found = shuffled(CAPTION, CaptionShuffle(count=6))
    assert found[0] == CAPTION and len(set(found)) == len(found) == 7
    assert {tuple(sorted(text.split(", "))) for text in found} == {tuple(sorted(PARTS))}
    assert len(shuffled(CAPTION, CaptionShuffle(count=6, include_original=False))) == 6
    assert CAPTION not in shuffled(CAPTION, CaptionShuffle(count=60, include_original=False))


def test_the_same_at_every_start_and_on_every_machine():
    """Pinned: embeddings are kept under these texts."""
    assert shuffled(CAPTION, CaptionShuffle(count=2)) == PINNED
    assert shuffled(CAPTION, CaptionShuffle(count=2, seed=1)) != PINNED
    assert shuffled(CAPTION + "!", CaptionShuffle(count=2))[1] != PINNED[1] + "!"
    assert shuffled(CAPTION, CaptionShuffle(count=5))[:3] == PINNED, "more of them keeps those there are"


PINNED = (
    CAPTION,
    "on a mat, at night, in Rome, photograph, a red cat",
    "at night, photograph, on a mat, in Rome, a red cat",
)


def test_parts_at_the_front_stay():
    for start in range(6):
        found = shuffled(CAPTION, CaptionShuffle(count=3, position_start=start))
        assert {tuple(text.split(", ")[:start]) for text in found} == {tuple(PARTS[:start])}
        assert len(found) == min(4, [120, 24, 6, 2, 1, 1][start])


def test_a_caption_with_few_orders_has_them_all():
    found = shuffled("a, b, c", CaptionShuffle(count=50))
    assert sorted(found) == sorted(", ".join(order) for order in permutations("abc")) and found[0] == "a, b, c"
    assert shuffled("a, b", CaptionShuffle(count=9, include_original=False)) == ("b, a",)


@pytest.mark.parametrize("caption", ["one part", "", "same, same, same", " , ,, x"])
def test_what_cannot_be_shuffled_is_its_only_variant(caption: str):
    for original in (True, False):
        assert shuffled(caption, CaptionShuffle(count=4, include_original=original)) == (caption,)


def test_the_same_part_twice_makes_no_variant_twice():
    found = shuffled("a, a, b", CaptionShuffle(count=9))
    assert sorted(found) == ["a, a, b", "a, b, a", "b, a, a"]


@pytest.mark.parametrize(
    "split_on, caption, parts",
    [("space", "Some  plain words", {"Some", "plain", "words"}), ("period", "One. Two, three. Four", set())],
)
def test_where_captions_are_split(split_on: str, caption: str, parts: set[str]):
    found = shuffled(caption, CaptionShuffle(count=5, split_on=split_on))
    assert len(found) == 6
    if parts:
        assert all(set(text.split()) == parts for text in found)
    else:
        assert all(set(text.split(". ")) == {"One", "Two, three", "Four"} for text in found)


def test_a_period_at_the_end_stays_there():
    found = shuffled("A cat. On a mat. At night.", CaptionShuffle(count=5, split_on="period"))
    assert len(found) == 6 and all(text.endswith(".") and text.count(".") == 3 and ".." not in text for text in found)


def test_every_order_is_as_likely_as_another():
    """Chi-square over the 24 orders of four parts, 4,800 captions: below the 99.9 % quantile of 23 degrees."""
    drawn = Counter()
    for number in range(4800):
        parts = [f"{letter}{number}" for letter in "abcd"]
        (text,) = shuffled(", ".join(parts), CaptionShuffle(include_original=False))
        drawn["".join(part[0] for part in text.split(", "))] += 1
    expected = 4800 / 23  # the order as written is never drawn
    assert len(drawn) == 23 and "abcd" not in drawn
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 49.7


def test_long_captions_are_quick():
    caption = " ".join(f"word{number}" for number in range(300))
    assert len(shuffled(caption, CaptionShuffle(count=100, split_on="space"))) == 101
