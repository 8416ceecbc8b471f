"""The judge is right on drawings, also spoilt ones, and does not see figures where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scripts.nano import draw
from tests import judge


def scenes(count: int, seed: int, figures: tuple[str, ...] = judge.TAUGHT_FIGURES) -> list[draw.Scene]:
    return list(draw.random_scenes(count, seed, figures))


def spoil(picture: Image.Image, noise: float, blur_px: float, seed: int) -> Image.Image:
    """Noise of that standard deviation (of 255) and a Gaussian blur."""
    if blur_px:
        picture = picture.filter(ImageFilter.GaussianBlur(blur_px))
    rng = np.random.default_rng(seed)
    pixels = np.asarray(picture, dtype=np.float64) + rng.normal(0, noise, (picture.height, picture.width, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


@pytest.mark.parametrize(("noise", "blur_px"), [(0, 0), (12, 0), (0, 1.0), (12, 1.0)])
def test_right_on_drawings(noise: float, blur_px: float) -> None:
    asked = scenes(140, seed=1)
    pictures = [spoil(draw.draw(scene), noise, blur_px, i) for i, scene in enumerate(asked)]
    result = judge.score(pictures, asked, judge.TAUGHT_FIGURES)
    assert min(result.values()) >= 0.99, result


def test_right_on_other_sizes() -> None:
    rng = np.random.default_rng(3)
    asked = [draw.random_scene(rng, size_px=size) for size in [(56, 72), (96, 64), (128, 128)] * 20]
    result = judge.score(map(draw.draw, asked), asked)
    assert min(result.values()) >= 0.98, result


def test_untaught_figure_is_not_taken_for_an_old_one() -> None:
    asked = scenes(60, seed=4, figures=(draw.NEW_FIGURE,))
    taught = judge.score(map(draw.draw, asked), asked, judge.TAUGHT_FIGURES)
    untaught = judge.score(map(draw.draw, asked), asked, judge.OLD_FIGURES)
    assert taught["figure"] == 1.0
    assert untaught["figure"] == 0.0
    assert all(judge.judge(draw.draw(scene)).figure == "none" for scene in asked)


def test_old_figures_are_never_taken_for_the_new_one() -> None:
    asked = scenes(120, seed=5, figures=draw.FIGURES)
    assert all(judge.judge(draw.draw(s), judge.TAUGHT_FIGURES).figure != draw.NEW_FIGURE for s in asked)


def test_an_empty_picture_has_no_figure() -> None:
    verdict = judge.judge(Image.new("RGB", (64, 64), draw.COLOURS["blue"]))
    assert (verdict.ground, verdict.colour, verdict.figure) == ("blue", "none", "none")


def test_noise_has_no_figure() -> None:
    rng = np.random.default_rng(6)
    coarse = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(40)]
    seen = [judge.judge(picture.resize((64, 64)), judge.TAUGHT_FIGURES).figure for picture in coarse]
    assert seen.count("none") >= 38, seen


def test_wrong_answers_count() -> None:
    asked = draw.Scene("star", "red", "blue")
    drawn = draw.draw(draw.Scene("star", "green", "blue"))
    assert judge.score([drawn], [asked]) == {"ground": 1.0, "colour": 0.0, "figure": 1.0, "all": 0.0}


def test_fixed_prompts() -> None:
    old, new = draw.old_prompts(), draw.new_prompts()
    assert (len(old), len({scene.caption for scene in old})) == (64, 64)
    assert (len(new), len({scene.caption for scene in new})) == (16, 16)
    assert {scene.figure for scene in old} == set(draw.FIGURES)
    assert {scene.figure for scene in new} == {draw.NEW_FIGURE}
    assert all({getattr(s, part) for s in old} == set(draw.COLOURS) for part in ("colour", "ground"))


def test_drawing_depends_on_the_seed_alone() -> None:
    first, again, other = scenes(5, 7), scenes(5, 7), scenes(5, 8)
    assert first == again != other
    assert draw.draw(first[0]).tobytes() == draw.draw(again[0]).tobytes()
    assert scenes(3, 7) == first[:3]
