"""Resize, crop and aspect buckets as integer arithmetic (contracts §4). Pure.

Sizes are worked out with exact fractions and integer roots, so that the same picture lands in the same bucket
on every machine: a bucket is part of a cache key.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import isqrt, lcm
from typing import NamedTuple

from sana_tune.config.values import AspectBucket

RESOLUTION_TYPES = ("pixel_area", "area", "pixel")
CROP_STYLES = ("center", "corner", "random")
CROP_ASPECTS = ("square", "preserve", "closest", "random")
CHANCE_BITS = 32

_MEGAPIXEL = 10**6
_REMEMBERED = 1 << 14  # sizes of pictures; those of one camera are few


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        """Pixels in all."""
        return self.width * self.height

    def covers(self, other: Size) -> bool:
        """Whether `other` can be cut out of this size."""
        return self.width >= other.width and self.height >= other.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Box(NamedTuple):
    """A crop in pixels of the resized picture: left and top are inside, right and bottom just outside."""

    left: int
    top: int
    right: int
    bottom: int


class Chance(NamedTuple):
    """What chance decides of one picture: whole numbers from 0 to 2**CHANCE_BITS - 1 (made by records.chance_of)."""

    aspect: int
    left: int
    top: int


@dataclass(frozen=True)
class Placement:
    """How one picture becomes one training picture: resize once, then crop.

    resize:   size after the one Lanczos resize of the whole (upright) original.
    crop_box: part of the resized picture that is kept; its size is the target, and the target is the bucket.
    """

    resize: Size
    crop_box: Box

    @property
    def target(self) -> Size:
        return Size(self.crop_box.right - self.crop_box.left, self.crop_box.bottom - self.crop_box.top)


@dataclass(frozen=True)
class Rules:
    """A dataset's settings that decide a picture's size.

    resolution_type: unit of the four sizes. pixel_area: an edge in px that stands for its square's area; area:
    megapixels (10⁶ px²); pixel: the shorter side in px.
    alignment: target sides are multiples of this, px. rounding: decimals of the aspect ratio (width / height).
    minimum_image_size, maximum_image_size, target_downsample_size: None or 0 = off; the last two need `crop`.
    max_upscale_threshold: the share of its side by which a picture may be enlarged; None = any.
    Raises ValueError for a name that is none, and for closest and random without crop_aspect_buckets.
    """

    resolution: float
    resolution_type: str = "pixel_area"
    crop: bool = False
    crop_style: str = "center"
    crop_aspect: str = "square"
    crop_aspect_buckets: tuple[AspectBucket, ...] = ()
    alignment: int = 32
    rounding: int = 2
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    minimum_aspect_ratio: float | None = None
    maximum_aspect_ratio: float | None = None
    max_upscale_threshold: float | None = None

    def __post_init__(self) -> None:
        known = {"resolution_type": RESOLUTION_TYPES, "crop_style": CROP_STYLES, "crop_aspect": CROP_ASPECTS}
        for name, values in known.items():
            if (value := vars(self)[name]) not in values:
                raise ValueError(f"{name} must be {' or '.join(values)}; found {value!r}")
        if self.crop and self.crop_aspect in ("closest", "random") and not self.crop_aspect_buckets:
            raise ValueError(f"crop_aspect {self.crop_aspect} needs crop_aspect_buckets")

    @property
    def needs_chance(self) -> bool:
        """Whether a placement depends on more than the picture's size."""
        return self.crop_style == "random" or (self.crop and self.crop_aspect == "random")


def round_to(x: float | Fraction, alignment: int) -> int:
    """The multiple of `alignment` nearest to x (halves go up), at least one alignment."""
    return alignment * max(1, _nearest(Fraction(x) / alignment))


def aspect_ratio(original: Size, decimals: int) -> Fraction:
    """Width / height rounded to `decimals`, exact as a decimal number and never 0."""
    scale = 10**decimals
    return Fraction(max(1, round(round(original.width / original.height, decimals) * scale)), scale)


def target_size(original: Size, rules: Rules, chance: Chance | None = None) -> Size:
    """The training size of a picture: its bucket. Both sides are multiples of the alignment.

    With A the area and r the aspect ratio of the target: W = round(√(A·r)), H = round(√(A/r)), to the alignment;
    for `pixel` with R the shorter side: round(R) and round(R·max(r, 1/r)).
    Raises ValueError when an aspect is to be drawn and there is no chance.
    """
    return _bucket(_target_ratio(original, rules, chance), rules)


def place(original: Size, rules: Rules, chance: Chance | None = None) -> Placement:
    """Resize and crop of an upright picture of size `original`.

    The picture keeps its aspect (to half a pixel), covers the target, and is cropped to it by crop_style. Raises
    ValueError when `rules.needs_chance` and there is none.
    """
    resize, target = _sizes(original, _target_ratio(original, rules, chance), rules)
    return _cropped(resize, target, rules, chance)


def place_into(original: Size, target: Size, rules: Rules, chance: Chance | None = None) -> Placement:
    """As `place`, but to a target that is given: that of a bucket which a small one is merged into."""
    return _cropped(_resized(original, target, rules), target, rules, chance)


def _cropped(resize: Size, target: Size, rules: Rules, chance: Chance | None) -> Placement:
    """The crop of a resized picture to the target, by crop_style."""
    spare_x, spare_y = resize.width - target.width, resize.height - target.height
    if rules.crop_style == "center":
        left, top = spare_x // 2, spare_y // 2
    elif rules.crop_style == "corner":
        left = top = 0
    else:
        drawn = _needed(chance)
        left, top = drawn.left * (spare_x + 1) >> CHANCE_BITS, drawn.top * (spare_y + 1) >> CHANCE_BITS
    return Placement(resize, Box(left, top, left + target.width, top + target.height))


def covering(original: Size, target: Size) -> Size:
    """The smallest size of the original's aspect that covers `target`; one side equals the target's."""
    width, height = original
    if target.width * height >= target.height * width:  # the width decides
        return Size(target.width, _nearest_quotient(height * target.width, width))
    return Size(_nearest_quotient(width * target.height, height), target.height)


def scale_to_cover(original: Size, target: Size) -> Fraction:
    """How many times its size a picture must have to cover `target`: above 1 it is enlarged."""
    return max(Fraction(target.width, original.width), Fraction(target.height, original.height))


def unfit(original: Size, rules: Rules, placement: Placement) -> str | None:
    """Why a picture is left out for its size or shape, or None when it is not. Completes "left out because it …"."""
    return _too_small(original, rules) or _misshapen(original, rules) or _blown_up(original, rules, placement)


def _too_small(original: Size, rules: Rules) -> str | None:
    least = rules.minimum_image_size
    if not least:
        return None
    if rules.resolution_type == "pixel":
        if min(original) >= least:
            return None
        return f"is {original} px; its shorter side is below minimum_image_size {least:g} px"
    if original.area >= _area(least, rules.resolution_type):
        return None
    if rules.resolution_type == "area":
        found = f"{original} px ({original.area / _MEGAPIXEL:g} megapixels)"
        return f"is {found}, smaller than minimum_image_size {least:g} (megapixels)"
    return f"is {original} px, smaller in area than minimum_image_size {least:g} ({least:g}x{least:g} px)"


def _misshapen(original: Size, rules: Rules) -> str | None:
    least, most = rules.minimum_aspect_ratio, rules.maximum_aspect_ratio
    if not least and not most:
        return None
    ratio = aspect_ratio(original, rules.rounding)
    found = f"is {original} px, an aspect ratio (width / height) of {float(ratio):g}"
    if least and ratio < _decimal(least):
        return f"{found}, below minimum_aspect_ratio {least:g}"
    if most and ratio > _decimal(most):
        return f"{found}, above maximum_aspect_ratio {most:g}"
    return None


def _blown_up(original: Size, rules: Rules, placement: Placement) -> str | None:
    share = rules.max_upscale_threshold
    target = placement.target
    if share is None or original.covers(target):
        return None
    scale = scale_to_cover(original, target)
    if scale <= 1 + _decimal(share):
        return None
    by, most = f"{float(100 * (scale - 1)):.4g} %", f"{float(100 * _decimal(share)):g} %"
    return (
        f"is {original} px and would be enlarged by {by}, to {placement.resize} px; max_upscale_threshold "
        f"{share:g} allows {most}"
    )


def _target_ratio(original: Size, rules: Rules, chance: Chance | None) -> Fraction:
    """Aspect ratio of the target."""
    if not rules.crop or rules.crop_aspect == "preserve":
        return aspect_ratio(original, rules.rounding)
    if rules.crop_aspect == "square":
        return Fraction(1)
    if rules.crop_aspect == "closest":
        return _closest(aspect_ratio(original, rules.rounding), rules.crop_aspect_buckets)
    aspects, upto = _shares(rules.crop_aspect_buckets)
    return aspects[bisect_right(upto, _needed(chance).aspect * upto[-1] >> CHANCE_BITS)]


def _needed(chance: Chance | None) -> Chance:
    if chance is None:
        raise ValueError("a random crop or aspect needs a Chance (records.chance_of)")
    return chance


@lru_cache(maxsize=_REMEMBERED)
def _closest(ratio: Fraction, buckets: tuple[AspectBucket, ...]) -> Fraction:
    """The bucket's aspect nearest to `ratio`; of two as near, the narrower."""
    return min(sorted(_decimal(bucket.aspect) for bucket in buckets), key=lambda aspect: abs(aspect - ratio))


@lru_cache(maxsize=64)
def _shares(buckets: tuple[AspectBucket, ...]) -> tuple[tuple[Fraction, ...], tuple[int, ...]]:
    """The aspects, narrowest first, and their weights as whole numbers, added up; the order written plays no part."""
    table = sorted((_decimal(bucket.aspect), _decimal(bucket.weight)) for bucket in buckets)
    unit = lcm(*(weight.denominator for _, weight in table))
    return tuple(aspect for aspect, _ in table), tuple(accumulate(int(weight * unit) for _, weight in table))


@lru_cache(maxsize=_REMEMBERED)
def _bucket(ratio: Fraction, rules: Rules) -> Size:
    """The target of an aspect ratio."""
    step = rules.alignment
    if rules.resolution_type == "pixel":
        shorter = _decimal(rules.resolution)
        return Size(round_to(shorter * max(ratio, 1), step), round_to(shorter * max(1 / ratio, 1), step))
    area = _area(rules.resolution, rules.resolution_type) / step**2
    return Size(step * max(1, _nearest_root(area * ratio)), step * max(1, _nearest_root(area / ratio)))


@lru_cache(maxsize=_REMEMBERED)
def _sizes(original: Size, ratio: Fraction, rules: Rules) -> tuple[Size, Size]:
    """Size after the resize, and the target."""
    target = _bucket(ratio, rules)
    return _resized(original, target, rules), target


def _resized(original: Size, target: Size, rules: Rules) -> Size:
    """The size of a picture after its resize, of which the target is cut."""
    resize = _downsampled(original, rules)
    return resize if resize is not None and resize.covers(target) else covering(original, target)


def _downsampled(original: Size, rules: Rules) -> Size | None:
    """The size a large picture gets before a crop (`target_downsample_size`), or None when it gets none."""
    most, wanted = rules.maximum_image_size, rules.target_downsample_size
    if not (rules.crop and most and wanted):
        return None
    ratio = Fraction(original.width, original.height)
    if rules.resolution_type == "pixel":
        if min(original) <= most:
            return None
        shorter = _decimal(wanted)
        return Size(max(1, _nearest(shorter * max(ratio, 1))), max(1, _nearest(shorter * max(1 / ratio, 1))))
    if original.area <= _area(most, rules.resolution_type):
        return None
    area = _area(wanted, rules.resolution_type)
    return Size(max(1, _nearest_root(area * ratio)), max(1, _nearest_root(area / ratio)))


@lru_cache(maxsize=256)
def _decimal(number: float) -> Fraction:
    """A setting as the decimal number the user wrote."""
    return Fraction(str(number))


@lru_cache(maxsize=256)
def _area(size: float, resolution_type: str) -> Fraction:
    """What a size of an area type stands for, px²."""
    return _decimal(size) * _MEGAPIXEL if resolution_type == "area" else _decimal(size) ** 2


def _nearest(x: Fraction) -> int:
    """The integer nearest to x; halves go up."""
    return _nearest_quotient(x.numerator, x.denominator)


def _nearest_quotient(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _nearest_root(x: Fraction) -> int:
    """The integer nearest to √x; halves go up. Exact: ⌊√x + ½⌋ = ⌊(⌊√(4x)⌋ + 1) / 2⌋."""
    return (isqrt(4 * x.numerator // x.denominator) + 1) // 2
