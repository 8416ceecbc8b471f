"""Bars: everything is to be seen on a terminal of 80 columns."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from sana_tune.watch.bars import Bars


def shown(width: int) -> list[str]:
    """What stands on the terminal at the end, line by line."""
    text = io.StringIO()
    bars = Bars(Console(file=text, force_terminal=True, width=width, legacy_windows=False), 1.0)
    bars.start()
    bars.show("Training", 0, 12_000)
    below = "loss 0.5123  lr 1.00e-05  grad 0.234  1.43 steps/s  5.7 images/s"
    bars.show("Training", 1003, 12_000, "2:08:18", below)
    bars.stop()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    return [line.split("\r")[-1].strip() for line in plain.rstrip().split("\n")][-2:]


def test_all_is_seen_on_eighty_columns():
    row, below = shown(80)
    assert row.startswith("Training ") and row.endswith("1003/12000 left 2:08:18") and "━" in row
    assert below == "loss 0.5123  lr 1.00e-05  grad 0.234  1.43 steps/s  5.7 images/s"


@pytest.mark.parametrize("width", [20, 40])
def test_a_narrow_terminal_cuts_the_line_and_wraps_nothing(width: int):
    assert len(shown(width)[1]) == width and shown(width)[1].endswith("…")


def test_without_an_estimate_of_its_own_rich_makes_one():
    text = io.StringIO()
    bars = Bars(Console(file=text, force_terminal=True, width=80), 1.0)
    with bars:
        bars.show("Caching captions", 1, 4)
        bars.show("Caching latents", 2, 4)
    assert "Caching captions" in text.getvalue() and "2/4" in text.getvalue()
    assert "-:--" in text.getvalue()


def test_a_cache_says_how_many_a_second():
    text, now = io.StringIO(), [0.0]
    bars = Bars(Console(file=text, force_terminal=True, width=80), 1.0)
    bars.get_time = lambda: now[0]
    with bars:
        for now[0] in (0.0, 1.0, 2.0):
            bars.show("Caching latents", int(4 * now[0]), 100)
        assert bars.below == "4.0 a second"
        bars.show("Training", 1, 10, "0:09", "loss 0.5")
        assert bars.below == "loss 0.5"
