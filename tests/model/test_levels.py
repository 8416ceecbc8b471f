"""Distributions of noise levels as quantile functions, and their pictures."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest

from sana_tune.model.levels import Levels, picture

KINDS = (
    Levels(),
    Levels(mean=-1.0, std=0.5),
    Levels("uniform"),
    Levels("beta", alpha=0.5, beta=0.5),
    Levels("beta", alpha=2.0, beta=5.0),
    Levels("mode"),
    Levels("mode", mode_scale=-1.0),
    Levels("mode", mode_scale=1.75),
    Levels("custom", table=(0.1, 0.4, 0.4, 0.9)),
)


@pytest.mark.parametrize("levels", KINDS, ids=str)
def test_quantiles_rise_within_0_and_1(levels: Levels):
    found = [levels.quantile(number / 1000) for number in range(1001)]
    assert found == sorted(found) and found[0] >= 0 and found[-1] <= 1 and found[0] < found[-1]


def test_the_recipe_has_the_recipes_quantiles():
    """shared numbers of the recipe: 5/50/95 % at shift 3 are .367 .75 .940."""
    assert [Levels().at(share, 3.0) for share in (0.05, 0.5, 0.95)] == pytest.approx([0.367, 0.75, 0.940], abs=5e-4)
    logit = NormalDist(-1.0, 0.5).inv_cdf(0.2)
    assert Levels(mean=-1.0, std=0.5).quantile(0.2) == pytest.approx(1 / (1 + math.exp(-logit)))


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (0.1, 0.1), (5.0, 1.0), (30.0, 60.0), (100.0, 100.0)])
def test_beta_is_that_of_the_standard_library(alpha: float, beta: float):
    chance = random.Random(1)
    drawn = sorted(chance.betavariate(alpha, beta) for _ in range(20_000))
    levels = Levels("beta", alpha=alpha, beta=beta)
    shares = (0.02, 0.25, 0.9)
    expected = [drawn[int(share * 20_000)] for share in shares]
    assert [levels.quantile(share) for share in shares] == pytest.approx(expected, abs=0.012)


def test_beta_has_its_closed_forms():
    assert Levels("beta", alpha=1.0, beta=1.0).quantile(0.3) == pytest.approx(0.3, abs=1e-5)
    level = Levels("beta", alpha=2.0, beta=2.0).quantile(0.3)
    assert 3 * level**2 - 2 * level**3 == pytest.approx(0.3, abs=1e-5)


def test_mode_is_the_formula_of_sd3():
    """arXiv 2403.03206, eq. 20: f(u) = 1 - u - s·(cos²(πu/2) - 1 + u), which falls from 1 to 0."""
    for s in (-1.0, 0.0, 1.29, 1.75):
        for u in (0.1, 0.35, 0.8):
            theirs = 1 - u - s * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
            assert Levels("mode", mode_scale=s).quantile(1 - u) == pytest.approx(theirs)


def test_a_table_is_drawn_evenly_and_not_shifted():
    levels = Levels("custom", table=(0.1, 0.5, 0.9))
    assert [levels.at(share, 3.0) for share in (0.0, 0.32, 0.34, 0.66, 0.67, 1.0)] == [0.1, 0.1, 0.5, 0.5, 0.9, 0.9]
    assert not levels.is_shifted and Levels().is_shifted


def test_an_unknown_kind_is_an_error():
    with pytest.raises(KeyError):
        Levels("linear").quantile(0.5)


def test_the_picture_shows_where_levels_are():
    assert picture(Levels("uniform"), 1.0, 8) == "█" * 8
    recipe = picture(Levels(), 3.0, 20)
    assert len(recipe) == 20 and recipe[0] == "▁" and recipe.index("█") >= 14
    assert picture(Levels("custom", table=(0.05, 0.95)), 3.0, 4) == "█▁▁█"


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (Levels(), "logit-normal (mean 0, std 1)"),
        (Levels("uniform", stratified=True), "uniform, stratified"),
        (Levels("beta", alpha=2, beta=5), "beta (2, 5)"),
        (Levels("custom", table=(0.5,)), "custom (1 levels)"),
    ],
)
def test_words(levels: Levels, words: str):
    assert levels.told() == words
