from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.data.geometry import Placement, Rules, Size, aspect_ratio, place, round_to, target_size, too_small

sizes = st.builds(Size, st.integers(1, 20_000), st.integers(1, 20_000))
resolutions = st.sampled_from([64, 256, 512, 1000, 1024, 2048])
rules = st.builds(
    Rules,
    resolution=resolutions,
    crop=st.booleans(),
    alignment=st.sampled_from([1, 8, 32, 64]),
    rounding=st.integers(1, 4),
    maximum_image_size=st.none() | resolutions,
    target_downsample_size=st.none() | resolutions,
)


@pytest.mark.parametrize(
    "original, expected",
    [
        ((1024, 1024), (1024, 1024)),
        ((4000, 4000), (1024, 1024)),  # r = 1
        ((1500, 1000), (1248, 832)),  # r = 1.5: √(2²⁰·1.5) = 1254.1, √(2²⁰/1.5) = 836.1
        ((1000, 1500), (832, 1248)),  # r = 0.67: 838.2, 1251.0
        ((1920, 1080), (1376, 768)),  # r = 1.78: 1366.2, 767.5
        ((3000, 1000), (1760, 576)),  # r = 3: 1773.6, 591.2
        ((10_000, 10), (32384, 32)),  # r = 1000: 32381.7, 32.4
    ],
)
def test_target_sizes_at_1024(original: tuple[int, int], expected: tuple[int, int]):
    assert target_size(Size(*original), Rules(resolution=1024)) == expected


@pytest.mark.parametrize("x, expected", [(0, 32), (47.9, 32), (48, 64), (64, 64), (79.99, 64), (80, 96)])
def test_rounds_to_the_nearest_multiple_and_at_least_one(x: float, expected: int):
    assert round_to(x, 32) == expected


def test_an_aspect_ratio_is_an_exact_decimal_and_never_zero():
    assert str(aspect_ratio(Size(1000, 1500), 2)) == "67/100"
    assert str(aspect_ratio(Size(1, 10_000), 2)) == "1/100"


@given(sizes, rules)
def test_targets_are_aligned_and_near_the_area(original: Size, rules: Rules):
    target = target_size(original, rules)
    assert all(side > 0 and side % rules.alignment == 0 for side in target)
    ratio = 1.0 if rules.crop else max(round(original.width / original.height, rules.rounding), 10**-rules.rounding)
    exact = (rules.resolution * math.sqrt(ratio), rules.resolution / math.sqrt(ratio))
    for side, wanted in zip(target, exact, strict=True):
        assert abs(side - wanted) <= rules.alignment / 2 * (1 + 1e-9) or side == rules.alignment


@given(sizes, rules)
def test_a_placement_covers_keeps_the_aspect_and_crops_at_the_center(original: Size, rules: Rules):
    placed = place(original, rules)
    box, resize = placed.crop_box, placed.resize
    assert placed.target == target_size(original, rules)
    assert 0 <= box.left and 0 <= box.top and box.right <= resize.width and box.bottom <= resize.height
    assert abs(box.left - (resize.width - box.right)) <= 1 and abs(box.top - (resize.height - box.bottom)) <= 1
    # Each side is within half a pixel of what the other one asks for.
    stretch_x, stretch_y = resize.width / original.width, resize.height / original.height
    assert abs(stretch_x - stretch_y) * max(original) <= 0.5 * max(original) / min(original) + 1e-6


@given(sizes, rules)
def test_without_downsampling_the_resize_is_the_smallest_that_covers(original: Size, rules: Rules):
    placed = place(original, replace(rules, maximum_image_size=None))
    assert placed.resize.width == placed.target.width or placed.resize.height == placed.target.height


@given(st.integers(1, 5000), st.integers(1, 5000), resolutions)
def test_turning_a_square_crop_turns_the_placement(width: int, height: int, resolution: int):
    crop = Rules(resolution=resolution, crop=True)
    upright, turned = place(Size(width, height), crop), place(Size(height, width), crop)
    assert turned.resize == tuple(reversed(upright.resize))


def test_square_crop_at_the_center():
    placed = place(Size(1600, 800), Rules(resolution=512, crop=True))
    assert placed.resize == (1024, 512)
    assert placed.crop_box == (256, 0, 768, 512)


def test_a_picture_of_the_target_size_is_left_alone():
    assert place(Size(512, 512), Rules(resolution=512)) == Placement(
        Size(512, 512), place(Size(512, 512), Rules(resolution=512)).crop_box
    )


def test_large_pictures_go_through_target_downsample_size_before_a_crop():
    rules = Rules(resolution=512, crop=True, maximum_image_size=1024, target_downsample_size=768)
    assert place(Size(2000, 2000), rules).resize == (768, 768)
    assert place(Size(1000, 1000), rules).resize == (512, 512)  # not above the maximum
    assert place(Size(4000, 1000), rules).resize == (2048, 512)  # 1536x384 would not cover
    assert place(Size(2000, 2000), replace(rules, crop=False)).resize == (512, 512)  # no effect without crop


def test_minimum_image_size_is_an_area():
    rules = Rules(resolution=512, minimum_image_size=512)
    assert too_small(Size(1024, 256), rules) is None
    assert too_small(Size(1024, 255), rules) == (
        "is 1024x255 px, smaller in area than minimum_image_size 512 (512x512 px)"
    )
    assert too_small(Size(1, 1), Rules(resolution=512)) is None
    assert too_small(Size(1, 1), replace(rules, minimum_image_size=0)) is None


@pytest.mark.parametrize("name, value", [("resolution_type", "area"), ("crop_style", "random"), ("crop_aspect", "x")])
def test_what_is_not_built_yet_is_refused(name: str, value: str):
    with pytest.raises(ValueError, match=name):
        Rules(resolution=512, **{name: value})


@settings(max_examples=20)
@given(st.integers(1, 400), st.integers(1, 32))
def test_halves_go_up_exactly(n: int, alignment: int):
    """A square whose side lies exactly between two multiples: no float may decide that."""
    odd_half = (2 * n + 1) * alignment
    assert target_size(Size(9, 9), Rules(resolution=odd_half / 2, alignment=alignment)).width == (n + 1) * alignment
