"""The benchmark of adapters times both loops; what it must tell is judged by hand, on a machine that is quiet."""

from __future__ import annotations

from lycoris.wrapper import LycorisNetwork

from scripts.benchmark_adapters import NANO, cost


def test_both_loops_are_timed_and_lycoris_is_left_as_it_was():
    before = list(LycorisNetwork.TARGET_REPLACE_MODULE)
    found = cost({**NANO, "num_layers": 1}, side=2, batch=1, rounds=1)
    assert found.ours_s > 0 and found.bare_s > 0 and found.ratio == found.ours_s / found.bare_s
    assert before == LycorisNetwork.TARGET_REPLACE_MODULE
