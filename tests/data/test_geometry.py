from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.config.values import AspectBucket
from sana_tune.data.geometry import (
    CHANCE_BITS,
    CROP_ASPECTS,
    CROP_STYLES,
    RESOLUTION_TYPES,
    Chance,
    Placement,
    Rules,
    Size,
    aspect_ratio,
    place,
    round_to,
    scale_to_cover,
    target_size,
    unfit,
)
from sana_tune.data.records import chance_of

BUCKETS = tuple(AspectBucket(aspect) for aspect in (0.5, 0.75, 1.0, 1.33, 2.0))
UNIT = 1 << CHANCE_BITS

sizes = st.builds(Size, st.integers(1, 20_000), st.integers(1, 20_000))
chances = st.builds(Chance, *[st.integers(0, UNIT - 1)] * 3)
edges = st.sampled_from([64, 256, 512, 1000, 1024, 2048])
megapixels = st.sampled_from([0.0625, 0.25, 0.5, 1, 1.05, 2.5])


def rules_of(kind: str) -> st.SearchStrategy[Rules]:
    """Rules of one resolution_type, each size in its unit."""
    unit = megapixels if kind == "area" else edges
    return st.builds(
        Rules,
        resolution=unit,
        resolution_type=st.just(kind),
        crop=st.booleans(),
        crop_style=st.sampled_from(CROP_STYLES),
        crop_aspect=st.sampled_from(CROP_ASPECTS),
        crop_aspect_buckets=st.just(BUCKETS),
        alignment=st.sampled_from([1, 8, 32, 64]),
        rounding=st.integers(1, 4),
        maximum_image_size=st.none() | unit,
        target_downsample_size=st.none() | unit,
    )


rules = st.sampled_from(RESOLUTION_TYPES).flatmap(rules_of)


# ---- contracts §4 once more, in floats ----


def wanted_ratio(original: Size, rules: Rules, chance: Chance) -> float:
    own = max(round(original.width / original.height, rules.rounding), 10**-rules.rounding)
    if not rules.crop or rules.crop_aspect == "preserve":
        return own
    if rules.crop_aspect == "square":
        return 1.0
    aspects = [bucket.aspect for bucket in rules.crop_aspect_buckets]
    if rules.crop_aspect == "closest":
        return min(aspects, key=lambda aspect: abs(aspect - own))
    return aspects[int(chance.aspect / UNIT * len(aspects))]  # all weigh the same


def wanted_sides(ratio: float, rules: Rules) -> tuple[float, float]:
    """Sides before they are rounded to the alignment, px."""
    if rules.resolution_type == "pixel":
        return rules.resolution * max(ratio, 1), rules.resolution * max(1 / ratio, 1)
    area = rules.resolution * 1e6 if rules.resolution_type == "area" else rules.resolution**2
    return math.sqrt(area * ratio), math.sqrt(area / ratio)


@given(sizes, rules, chances)
def test_targets_are_those_of_the_contract(original: Size, rules: Rules, chance: Chance):
    target = target_size(original, rules, chance)
    assert all(side > 0 and side % rules.alignment == 0 for side in target)
    for side, wanted in zip(target, wanted_sides(wanted_ratio(original, rules, chance), rules), strict=True):
        assert abs(side - wanted) <= rules.alignment / 2 * (1 + 1e-9) or side == rules.alignment


@given(sizes, rules, chances)
def test_a_placement_covers_the_target_keeps_the_aspect_and_crops_inside(original: Size, rules: Rules, chance: Chance):
    placed = place(original, rules, chance)
    box, resize = placed.crop_box, placed.resize
    assert placed.target == target_size(original, rules, chance)
    assert resize.covers(placed.target)
    assert 0 <= box.left and 0 <= box.top and box.right <= resize.width and box.bottom <= resize.height
    # Each side is within half a pixel of what the other one asks for.
    stretch_x, stretch_y = resize.width / original.width, resize.height / original.height
    assert abs(stretch_x - stretch_y) * max(original) <= 0.5 * max(original) / min(original) + 1e-6


@given(sizes, rules, chances)
def test_the_crop_is_where_crop_style_says(original: Size, rules: Rules, chance: Chance):
    placed = place(original, rules, chance)
    box, resize = placed.crop_box, placed.resize
    right, below = resize.width - box.right, resize.height - box.bottom
    if rules.crop_style == "center":
        assert 0 <= right - box.left <= 1 and 0 <= below - box.top <= 1
    elif rules.crop_style == "corner":
        assert (box.left, box.top) == (0, 0)
    else:
        assert box.left == math.floor(chance.left / UNIT * (box.left + right + 1))
        assert box.top == math.floor(chance.top / UNIT * (box.top + below + 1))


@given(sizes, rules, chances)
def test_without_downsampling_the_resize_is_the_smallest_that_covers(original: Size, rules: Rules, chance: Chance):
    placed = place(original, replace(rules, maximum_image_size=None), chance)
    assert placed.resize.width == placed.target.width or placed.resize.height == placed.target.height


@given(st.integers(1, 5000), st.integers(1, 5000), edges, st.sampled_from(["pixel", "pixel_area"]))
def test_turning_a_square_crop_turns_the_placement(width: int, height: int, resolution: int, kind: str):
    crop = Rules(resolution=resolution, resolution_type=kind, crop=True)
    upright, turned = place(Size(width, height), crop), place(Size(height, width), crop)
    assert turned.resize == tuple(reversed(upright.resize))


# ---- sizes by hand ----


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
    assert target_size(Size(*original), Rules(resolution=1.048576, resolution_type="area")) == expected


@pytest.mark.parametrize(
    "original, expected",
    [
        ((1500, 1000), (1216, 832)),  # 1 megapixel: √1.5e6 = 1224.7, √(1e6/1.5) = 816.5
        ((1000, 1000), (992, 992)),  # 1000 lies between 992 and 1024
    ],
)
def test_target_sizes_of_one_megapixel(original: tuple[int, int], expected: tuple[int, int]):
    assert target_size(Size(*original), Rules(resolution=1.0, resolution_type="area")) == expected


@pytest.mark.parametrize(
    "original, expected",
    [
        ((1500, 1000), (768, 512)),
        ((1000, 1500), (512, 768)),  # r = 0.67: 512 / 0.67 = 764.2
        ((1920, 1080), (896, 512)),  # r = 1.78: 911.4 is nearer to 896 than to 928
        ((700, 700), (512, 512)),
    ],
)
def test_target_sizes_by_the_shorter_side(original: tuple[int, int], expected: tuple[int, int]):
    assert target_size(Size(*original), Rules(resolution=512, resolution_type="pixel")) == expected
    assert target_size(Size(*original), Rules(resolution=500, resolution_type="pixel", crop=True)) == (512, 512)


@pytest.mark.parametrize("x, expected", [(0, 32), (47.9, 32), (48, 64), (64, 64), (79.99, 64), (80, 96)])
def test_rounds_to_the_nearest_multiple_and_at_least_one(x: float, expected: int):
    assert round_to(x, 32) == expected


@settings(max_examples=20)
@given(st.integers(1, 400), st.integers(1, 32))
def test_halves_go_up_exactly(n: int, alignment: int):
    """A square whose side lies exactly between two multiples: no float may decide that."""
    odd_half = (2 * n + 1) * alignment
    for kind in ("pixel_area", "pixel"):
        rules = Rules(resolution=odd_half / 2, resolution_type=kind, alignment=alignment)
        assert target_size(Size(9, 9), rules) == ((n + 1) * alignment,) * 2


def test_an_aspect_ratio_is_an_exact_decimal_and_never_zero():
    assert str(aspect_ratio(Size(1000, 1500), 2)) == "67/100"
    assert str(aspect_ratio(Size(1, 10_000), 2)) == "1/100"


@given(sizes, st.integers(1, 9))
def test_an_aspect_ratio_is_what_its_decimals_say(size: Size, decimals: int):
    written = Fraction(str(round(size.width / size.height, decimals)))
    assert aspect_ratio(size, decimals) == max(written, Fraction(1, 10**decimals))


# ---- crops ----


def test_square_crop_at_the_center_and_in_the_corner():
    placed = place(Size(1600, 800), Rules(resolution=512, crop=True))
    assert placed.resize == (1024, 512)
    assert placed.crop_box == (256, 0, 768, 512)
    assert place(Size(1600, 800), Rules(resolution=512, crop=True, crop_style="corner")).crop_box == (0, 0, 512, 512)


def test_a_picture_of_the_target_size_is_left_alone():
    assert place(Size(512, 512), Rules(resolution=512)) == Placement(
        Size(512, 512), place(Size(512, 512), Rules(resolution=512)).crop_box
    )


def test_preserve_is_the_pictures_own_aspect():
    original, rules = Size(1500, 1000), Rules(resolution=512)
    assert place(original, replace(rules, crop=True, crop_aspect="preserve")) == place(original, rules)


@pytest.mark.parametrize(
    "original, ratio",
    [((1000, 1000), 1.0), ((4000, 1000), 2.0), ((100, 1000), 0.5), ((1600, 1000), 1.33), ((700, 1000), 0.75)],
)
def test_closest_takes_the_nearest_bucket_whatever_it_weighs(original: tuple[int, int], ratio: float):
    weighted = tuple(AspectBucket(bucket.aspect, 1 + 9 * bucket.aspect) for bucket in BUCKETS)
    for buckets in (BUCKETS, BUCKETS[::-1], weighted):
        rules = Rules(resolution=1024, crop=True, crop_aspect="closest", crop_aspect_buckets=buckets, alignment=1)
        assert target_size(Size(*original), rules) == tuple(round(side) for side in wanted_sides(ratio, rules))


def test_of_two_buckets_as_near_the_narrower_is_taken():
    for aspects in ((0.5, 1.5), (1.5, 0.5)):
        buckets = tuple(map(AspectBucket, aspects))
        rules = Rules(resolution=64, crop=True, crop_aspect="closest", crop_aspect_buckets=buckets, alignment=1)
        assert target_size(Size(9, 9), rules) == (45, 91)


def test_random_aspects_are_drawn_by_weight_over_keys():
    buckets = (AspectBucket(2.0, 0.6), AspectBucket(0.5, 0.2), AspectBucket(1.0, 1.2))
    rules = Rules(resolution=512, crop=True, crop_aspect="random", crop_aspect_buckets=buckets)
    keys = [f"{number}.png" for number in range(4000)]

    def drawn(rules: Rules, seed: int = 1, dataset: str = "cats") -> list[Size]:
        return [target_size(Size(900, 900), rules, chance_of(seed, dataset, key)) for key in keys]

    first = drawn(rules)
    counts = Counter(first)
    shares = [counts[size] / len(keys) for size in ((736, 352), (352, 736), (512, 512))]
    assert shares == pytest.approx([0.3, 0.1, 0.6], abs=0.03)
    assert first == drawn(replace(rules, crop_aspect_buckets=buckets[::-1])), "the order in the file plays no part"
    assert first != drawn(rules, seed=2) and first != drawn(rules, dataset="dogs")


def test_random_crops_are_spread_evenly_over_keys_and_both_ways_apart():
    rules = Rules(resolution=64, crop=True, crop_style="random", maximum_image_size=64, target_downsample_size=100)
    boxes = [place(Size(200, 200), rules, chance_of(0, "cats", f"{number}.png")).crop_box for number in range(4000)]
    lefts, tops = [box.left for box in boxes], [box.top for box in boxes]
    for places in (lefts, tops):
        assert set(places) == set(range(37)), "every place from 0 to 100 - 64 is taken"
        assert max(Counter(places).values()) < 2 * len(boxes) / 37
    mean = sum((left - 18) * (top - 18) for left, top in zip(lefts, tops, strict=True)) / len(boxes)
    assert abs(mean) < 0.06 * 37**2 / 12, "left and top are not drawn together"


def test_chance_is_a_function_of_seed_dataset_and_key():
    assert chance_of(1, "cats", "a.png") == chance_of(1, "cats", "a.png")
    others = [chance_of(2, "cats", "a.png"), chance_of(1, "dogs", "a.png"), chance_of(1, "cats", "b.png")]
    assert len({chance_of(1, "cats", "a.png"), *others}) == 4
    assert all(0 <= part < UNIT for part in chance_of(1, "cats", "a.png"))


def test_chance_is_asked_for_where_it_is_needed_alone():
    crop = Rules(resolution=64, crop=True)
    assert not crop.needs_chance and not replace(crop, crop_style="corner", crop_aspect="preserve").needs_chance
    drawing = replace(crop, crop_aspect="random", crop_aspect_buckets=BUCKETS)
    assert drawing.needs_chance and not replace(drawing, crop=False).needs_chance
    assert replace(crop, crop=False, crop_style="random").needs_chance
    for needy in (drawing, replace(crop, crop_style="random")):
        with pytest.raises(ValueError, match="needs a Chance"):
            place(Size(90, 90), needy)


# ---- maximum_image_size and target_downsample_size ----


@pytest.mark.parametrize("unit", ["pixel_area", "area"])
def test_large_pictures_go_through_target_downsample_size_before_a_crop(unit: str):
    edges = {"resolution": 512, "maximum_image_size": 1024, "target_downsample_size": 768}
    sizes = edges if unit == "pixel_area" else {name: edge**2 / 1e6 for name, edge in edges.items()}
    rules = Rules(**sizes, resolution_type=unit, crop=True)
    assert place(Size(2000, 2000), rules).resize == (768, 768)
    assert place(Size(1000, 1000), rules).resize == (512, 512)  # not above the maximum
    assert place(Size(4000, 1000), rules).resize == (2048, 512)  # 1536x384 would not cover
    assert place(Size(2000, 2000), replace(rules, crop=False)).resize == (512, 512)  # no effect without crop


def test_with_pixel_the_shorter_side_decides_what_is_large():
    sizes = {"resolution": 512, "maximum_image_size": 1024, "target_downsample_size": 768}
    rules = Rules(**sizes, resolution_type="pixel", crop=True)
    assert place(Size(1025, 2050), rules).resize == (768, 1536)
    assert place(Size(1024, 4000), rules).resize == (512, 2000)  # the shorter side is not above the maximum


# ---- what is left out ----


def reason(original: tuple[int, int], **settings) -> str | None:
    rules = Rules(**{"resolution": 512, **settings})
    return unfit(Size(*original), rules, place(Size(*original), rules))


def test_minimum_image_size_is_an_area_of_px():
    assert reason((1024, 256), minimum_image_size=512) is None
    assert reason((1024, 255), minimum_image_size=512) == (
        "is 1024x255 px, smaller in area than minimum_image_size 512 (512x512 px)"
    )
    assert reason((1, 1)) is None and reason((1, 1), minimum_image_size=0) is None


def test_minimum_image_size_in_megapixels():
    settings = {"resolution": 0.25, "resolution_type": "area", "minimum_image_size": 0.5}
    assert reason((1000, 500), **settings) is None
    assert reason((999, 500), **settings) == (
        "is 999x500 px (0.4995 megapixels), smaller than minimum_image_size 0.5 (megapixels)"
    )


def test_minimum_image_size_of_both_sides():
    settings = {"resolution_type": "pixel", "minimum_image_size": 512}
    assert reason((512, 9000), **settings) is None
    assert reason((9000, 511), **settings) == "is 9000x511 px; its shorter side is below minimum_image_size 512 px"


def test_aspect_ratios_are_limited_after_rounding():
    limits = {"minimum_aspect_ratio": 0.67, "maximum_aspect_ratio": 1.33}
    assert reason((1000, 1500), **limits) is None  # 0.6667 is 0.67 here
    assert reason((1600, 1200), **limits) is None
    assert reason((1600, 1100), **limits) == (
        "is 1600x1100 px, an aspect ratio (width / height) of 1.45, above maximum_aspect_ratio 1.33"
    )
    assert reason((500, 1000), **limits) == (
        "is 500x1000 px, an aspect ratio (width / height) of 0.5, below minimum_aspect_ratio 0.67"
    )
    assert reason((500, 1000), maximum_aspect_ratio=1.0) is None
    assert "above" in (reason((500, 1000), maximum_aspect_ratio=0.4, crop=True) or ""), "a crop does not change it"


def test_pictures_that_would_be_enlarged_too_much():
    assert reason((100, 100)) is None, "no limit unless one is set"
    limit = {"max_upscale_threshold": 0.28}
    assert reason((400, 400), **limit) is None  # 512 / 400 = 1.28 exactly
    assert reason((399, 399), **limit) == (
        "is 399x399 px and would be enlarged by 28.32 %, to 512x512 px; max_upscale_threshold 0.28 allows 28 %"
    )
    assert reason((511, 511), max_upscale_threshold=0.0) and reason((512, 512), max_upscale_threshold=0.0) is None
    assert reason((1000, 399), crop=True, **limit), "the side that has to grow most decides"


@given(sizes, rules, chances, st.sampled_from([0.0, 0.1, 0.5, 3.0]))
def test_the_limit_is_on_what_covering_the_target_takes(original: Size, rules: Rules, chance: Chance, share: float):
    placed = place(original, rules, chance)
    needed = max(placed.target.width / original.width, placed.target.height / original.height)
    assert float(scale_to_cover(original, placed.target)) == pytest.approx(needed)
    if abs(needed - 1 - share) > 1e-9:
        limited = replace(rules, max_upscale_threshold=share)
        assert (unfit(original, limited, placed) is not None) == (needed > 1 + share)


# ---- mistakes, and speed ----


@pytest.mark.parametrize("name", ["resolution_type", "crop_style", "crop_aspect"])
def test_names_that_are_none_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be .* or .*; found 'x'"):
        Rules(resolution=512, **{name: "x"})


@pytest.mark.parametrize("aspect", ["closest", "random"])
def test_choosing_among_no_buckets_is_refused(aspect: str):
    with pytest.raises(ValueError, match=f"crop_aspect {aspect} needs crop_aspect_buckets"):
        Rules(resolution=512, crop=True, crop_aspect=aspect)


def test_ten_thousand_pictures_of_as_many_sizes_are_placed_in_a_moment():
    rules = Rules(
        resolution=512,
        crop=True,
        crop_style="random",
        crop_aspect="closest",
        crop_aspect_buckets=BUCKETS,
        maximum_image_size=777,
        target_downsample_size=600,
    )
    begun = time.thread_time()
    for number in range(10_000):
        place(Size(401 + number % 101, 307 + number // 101), rules, Chance(number, number, number))
    assert time.thread_time() - begun < 5  # it takes 0.15 s
