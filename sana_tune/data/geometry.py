"""Resize, crop and aspect buckets as integer arithmetic (contracts §4). Pure.

Sizes are worked out with exact fractions and integer roots, so that the same picture lands in the same bucket
on every machine: a bucket is part of a cache key.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import NamedTuple


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
    """A dataset's settings that decide a picture's size. Every size is an edge in px that stands for its
    square's area.

    alignment: target sides are multiples of this, px. rounding: decimals of the aspect ratio.
    minimum_image_size, maximum_image_size, target_downsample_size: None or 0 = off; the last two need `crop`.
    """

    resolution: float
    resolution_type: str = "pixel_area"
    crop: bool = False
    crop_style: str = "center"
    crop_aspect: str = "square"
    alignment: int = 32
    rounding: int = 2
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None

    def __post_init__(self) -> None:
        known = {"resolution_type": "pixel_area", "crop_style": "center", "crop_aspect": "square"}
        for name, only in known.items():
            if (value := vars(self)[name]) != only:
                raise ValueError(f"{name} must be {only!r} in this version; found {value!r}")


def round_to(x: float | Fraction, alignment: int) -> int:
    """The multiple of `alignment` nearest to x (halves go up), at least one alignment."""
    return alignment * max(1, _nearest(Fraction(x) / alignment))


def target_size(original: Size, rules: Rules) -> Size:
    """The training size of a picture: its bucket. Both sides are multiples of the alignment.

    A = resolution² px; W = round(√(A·r)), H = round(√(A/r)), to the alignment; r = the aspect ratio after
    rounding, or 1 for a square crop.
    """
    ratio = Fraction(1) if rules.crop else aspect_ratio(original, rules.rounding)
    area = _square(rules.resolution)
    step = rules.alignment

    def side(area_of_side: Fraction) -> int:
        return step * max(1, _nearest_root(area_of_side / step**2))

    return Size(side(area * ratio), side(area / ratio))


def aspect_ratio(original: Size, decimals: int) -> Fraction:
    """Width / height rounded to `decimals`, exact as a decimal number and never 0."""
    rounded = Fraction(str(round(original.width / original.height, decimals)))
    return max(rounded, Fraction(1, 10**decimals))


@lru_cache(maxsize=4096)  # pictures of one camera have one size
def place(original: Size, rules: Rules) -> Placement:
    """Resize and crop of an upright picture of size `original`.

    The picture keeps its aspect (to half a pixel), covers the target, and is cropped to it at the center.
    """
    target = target_size(original, rules)
    resize = _downsampled(original, rules)
    if resize is None or not resize.covers(target):
        resize = covering(original, target)
    left = (resize.width - target.width) // 2
    top = (resize.height - target.height) // 2
    return Placement(resize, Box(left, top, left + target.width, top + target.height))


def covering(original: Size, target: Size) -> Size:
    """The smallest size of the original's aspect that covers `target`; one side equals the target's."""
    if target.width * original.height >= target.height * original.width:  # the width decides
        return Size(target.width, _nearest(Fraction(original.height * target.width, original.width)))
    return Size(_nearest(Fraction(original.width * target.height, original.height)), target.height)


def too_small(original: Size, rules: Rules) -> str | None:
    """Why a picture is below `minimum_image_size`, or None when it is not."""
    if not rules.minimum_image_size or original.area >= _square(rules.minimum_image_size):
        return None
    minimum = f"{rules.minimum_image_size:g}"
    return f"is {original} px, smaller in area than minimum_image_size {minimum} ({minimum}x{minimum} px)"


def _downsampled(original: Size, rules: Rules) -> Size | None:
    """The size a large picture gets before a crop (`target_downsample_size`), or None when it gets none."""
    if not (rules.crop and rules.maximum_image_size and rules.target_downsample_size):
        return None
    if original.area <= _square(rules.maximum_image_size):
        return None
    area, ratio = _square(rules.target_downsample_size), Fraction(original.width, original.height)
    return Size(max(1, _nearest_root(area * ratio)), max(1, _nearest_root(area / ratio)))


def _square(edge: float) -> Fraction:
    """edge², with the edge taken as the decimal number the user wrote."""
    return Fraction(str(edge)) ** 2


def _nearest(x: Fraction) -> int:
    """The integer nearest to x; halves go up."""
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def _nearest_root(x: Fraction) -> int:
    """The integer nearest to √x; halves go up. Exact: ⌊√x + ½⌋ = ⌊(⌊√(4x)⌋ + 1) / 2⌋."""
    return (isqrt(int(4 * x)) + 1) // 2
