"""A rule-based judge of nano's pictures: which ground, which colour, which figure.

No learning: colours are the nearest of the palette, the figure is the template that overlaps best after
moving and scaling it to the seen figure's centre and area. It works on any picture of about 40 px and more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scripts.nano import draw

Floats = NDArray[np.float64]
OLD_FIGURES = draw.FIGURES
TAUGHT_FIGURES = (*draw.FIGURES, draw.NEW_FIGURE)
MIN_OVERLAP = 0.6  # below it, the figure is "none": a blob must not count as its nearest template
MIN_SHARE = 0.02  # of the picture; smaller specks are not a figure
FAR_FROM_GROUND = 55.0  # RGB distance; the palette's closest pair is more than twice as far apart
TEMPLATE_PX = 128

_PALETTE: Floats = np.array(list(draw.COLOURS.values()), dtype=np.float64)
_NAMES = list(draw.COLOURS)


@dataclass(frozen=True)
class Verdict:
    """What the judge saw; "none" where it saw nothing."""

    ground: str
    colour: str
    figure: str
    overlap: float  # of the best template with the seen figure, 0..1


def _pixels(picture: Image.Image | NDArray) -> Floats:
    """[H, W, 3], 0..255."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    return np.asarray(picture, dtype=np.float64)


def _nearest(colours: Floats) -> NDArray[np.int64]:
    """Number of the nearest palette colour for each of [..., 3]."""
    return np.linalg.norm(colours[..., None, :] - _PALETTE, axis=-1).argmin(-1)


def _smooth(pixels: Floats) -> Floats:
    """Mean over 3 x 3 pixels: takes most of the noise away before colours are compared."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    return np.mean([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)


def _ground_colour(pixels: Floats) -> Floats:
    """Median of the outermost two pixels: a figure may touch the edge, but never fills half of it."""
    edge = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in edge]), axis=0)


def _figure_colour(pixels: Floats, ground: Floats) -> Floats | None:
    """The commonest palette colour away from the ground's, as it is in the picture (median of its pixels)."""
    far = pixels[np.linalg.norm(pixels - ground, axis=-1) > FAR_FROM_GROUND]
    if len(far) < MIN_SHARE * pixels.shape[0] * pixels.shape[1]:
        return None
    names = _nearest(far)
    counts = np.bincount(names, minlength=len(_PALETTE))
    counts[_nearest(ground)] = 0
    if not counts.any():
        return None
    best = int(counts.argmax())
    # Of two colours' mixtures at the edge some are nearest to a third colour; the inside outnumbers them.
    return np.median(far[names == best], axis=0)


def _coverage(pixels: Floats, ground: Floats, figure: Floats) -> Floats:
    """How far each pixel is on the way from the ground's colour to the figure's, [H, W] in 0..1."""
    way = figure - ground
    return np.clip((pixels - ground) @ way / (way @ way), 0, 1)


def _place(mask: Floats) -> tuple[float, float, float]:
    """(centre x, centre y, sqrt(area)) of a mask in pixels."""
    area = mask.sum()
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    return float((mask * x).sum() / area), float((mask * y).sum() / area), float(np.sqrt(area))


@cache
def _template(figure: str) -> tuple[Floats, tuple[float, float, float]]:
    centre = (TEMPLATE_PX / 2, TEMPLATE_PX / 2)
    image = draw.draw_mask(figure, centre, 0.4 * TEMPLATE_PX, (TEMPLATE_PX, TEMPLATE_PX))
    mask = np.asarray(image, dtype=np.float64) / 255
    return mask, _place(mask)


def _overlap(mask: Floats, figure: str) -> float:
    """Intersection over union of a hard mask [H, W] and the template laid over it."""
    template, (tx, ty, tscale) = _template(figure)
    x, y, scale = _place(mask)
    rows, columns = np.arange(mask.shape[0]) + 0.5, np.arange(mask.shape[1]) + 0.5
    best = 0.0
    for stretch in (0.96, 1.0, 1.04):
        ratio = tscale / (scale * stretch)
        i = np.floor((rows - y) * ratio + ty).astype(int)
        j = np.floor((columns - x) * ratio + tx).astype(int)
        inside = ((i >= 0) & (i < TEMPLATE_PX))[:, None] & ((j >= 0) & (j < TEMPLATE_PX))[None]
        laid = template[np.clip(i, 0, TEMPLATE_PX - 1)[:, None], np.clip(j, 0, TEMPLATE_PX - 1)[None]] * inside
        best = max(best, float(np.minimum(laid, mask).sum() / np.maximum(laid, mask).sum()))
    return best


def judge(picture: Image.Image | NDArray, figures: Iterable[str] = OLD_FIGURES) -> Verdict:
    """Look at one RGB picture; ``figures`` are the ones the judge has been taught."""
    pixels = _pixels(picture)
    smooth = _smooth(pixels)
    ground = _ground_colour(pixels)
    ground_name = _NAMES[int(_nearest(ground))]
    colour = _figure_colour(smooth, ground)
    if colour is None:
        return Verdict(ground_name, "none", "none", 0.0)
    coverage = _coverage(pixels, ground, colour)
    mask = (coverage > 0.5).astype(np.float64)
    if mask.mean() < MIN_SHARE:
        return Verdict(ground_name, _NAMES[int(_nearest(colour))], "none", 0.0)
    overlaps = {figure: _overlap(mask, figure) for figure in figures}
    best = max(overlaps, key=lambda figure: overlaps[figure])
    seen = best if overlaps[best] >= MIN_OVERLAP else "none"
    return Verdict(ground_name, _NAMES[int(_nearest(colour))], seen, overlaps[best])


def score(
    pictures: Iterable[Image.Image], scenes: Iterable[draw.Scene], figures: Iterable[str] = OLD_FIGURES
) -> dict[str, float]:
    """Shares (0..1) of pictures with the right ground, colour and figure, and with all three."""
    taught = tuple(figures)
    rows = []
    for picture, scene in zip(pictures, scenes, strict=True):
        seen = judge(picture, taught)
        right = (seen.ground == scene.ground, seen.colour == scene.colour, seen.figure == scene.figure)
        rows.append((*right, all(right)))
    means = np.mean(np.array(rows, dtype=np.float64), axis=0)
    return dict(zip(("ground", "colour", "figure", "all"), map(float, means), strict=True))
