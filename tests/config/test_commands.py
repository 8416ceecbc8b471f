"""Commands with placeholders: no value is ever more than a part of one word."""

from __future__ import annotations

import pytest

from sana_tune.config.commands import words_of, wrong_with


def test_a_value_stays_in_its_word():
    values = {"path": "a b; rm -rf / $(x) 'q'", "step": "5"}
    assert words_of("draw --from {path} '--step={step} of {step}'", values) == [
        "draw", "--from", "a b; rm -rf / $(x) 'q'", "--step=5 of 5",
    ]  # fmt: skip


def test_a_value_that_looks_like_a_placeholder_is_left_alone():
    assert words_of("echo {a}", {"a": "{b}", "b": "no"}) == ["echo", "{b}"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("draw {global_step}", None),
        ("awk {print}", "there is no placeholder {print}; there are {global_step}"),
        ("draw {global_stp}", "did you mean {global_step}?"),
        ("draw 'x", "its quotes do not match"),
        ("  ", "it is empty"),
    ],
)
def test_what_is_wrong_is_said(command, expected):
    found = wrong_with(command, ("global_step",))
    assert found is None if expected is None else found is not None and expected in found
