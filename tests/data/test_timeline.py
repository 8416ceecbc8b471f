"""Which dataset comes when: whatever starts and ends, nothing comes out of its time, too often or too seldom."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.data.timeline import Timeline, Window

MODES = st.sampled_from(["auto-weighting", "uniform"])
WEIGHTS = st.sampled_from([Fraction(1, 10), Fraction(1, 2), Fraction(1), Fraction(73, 10)])


def maybe(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.integers(low, high))


@st.composite
def windows(draw) -> Window:
    start_epoch, start_step = draw(st.sampled_from([1, 1, 2, 3])), draw(st.one_of(st.just(0), st.integers(0, 30)))
    end_epoch, end_step = draw(maybe(start_epoch, 5)), draw(maybe(max(1, start_step), 40))
    return Window(start_epoch, start_step, end_epoch, end_step)


@st.composite
def timelines(draw) -> tuple[Timeline, list[int], list[Window], int]:
    """A timeline with its counts, its windows, and micro-batches of a step. The first dataset is there from the start,
    and may end."""
    number = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 25), min_size=number, max_size=number))
    weights = draw(st.lists(WEIGHTS, min_size=number, max_size=number))
    first = Window(end_epoch=draw(maybe(1, 6)), end_step=draw(maybe(1, 60)))
    shown = [first, *(draw(windows()) for _ in range(number - 1))]
    per_step = draw(st.integers(1, 4))
    made = Timeline(counts, weights, draw(MODES), draw(st.integers(0, 9)), shown, per_step)
    return made, counts, shown, per_step


def course(timeline: Timeline, most: int = 250) -> list[tuple[int, int, int]]:
    """(epoch, dataset, k) of the first micro-batches."""
    end = most if timeline.end is None else min(most, timeline.end)
    return [timeline.at(index) for index in range(end)]


@settings(max_examples=300, deadline=None)
@given(timelines())
def test_nothing_comes_out_of_its_time_and_all_that_should_come(drawn):
    timeline, counts, shown, per_step = drawn
    found = course(timeline)
    epochs = [epoch for epoch, _, _ in found]
    assert all(after - before in (0, 1) for before, after in pairwise(epochs)) and epochs[:1] == [0][: len(epochs)]
    for index, (epoch, dataset, _) in enumerate(found):
        window, step = shown[dataset], index // per_step + 1
        assert max(1, window.start_step) <= step <= (window.end_step or step), "by its steps"
        assert window.start_epoch <= epoch + 1 <= (window.end_epoch or epoch + 1), "by its epochs"
    last = epochs[-1] if epochs else 0
    for epoch in range(last if timeline.end != len(found) else last + 1):  # whole epochs
        inside = [index for index, one in enumerate(epochs) if one == epoch]
        seen = Counter(found[index][1] for index in inside)
        for dataset, window in enumerate(shown):
            turns = [k for e, d, k in found if (e, d) == (epoch, dataset)]
            assert turns == list(range(len(turns))), "its own micro-batches in order, none twice"
            begins, end = window.begins(per_step), window.ends(per_step)
            ends_inside = end is not None and end <= inside[-1] + 1
            if not window.in_epoch(epoch) or begins > inside[-1] or (end is not None and end <= inside[0]):
                assert seen[dataset] == 0
            elif not ends_inside:
                assert seen[dataset] == counts[dataset], "whole, wherever in the epoch it started"


@settings(max_examples=200, deadline=None)
@given(timelines())
def test_what_is_asked_of_a_position_follows_from_the_course(drawn):
    timeline, counts, _, _ = drawn
    found = course(timeline, 120)
    so_far: Counter[int] = Counter()
    before = -1.0
    for index, (epoch, dataset, _) in enumerate(found):
        assert timeline.given(index) == [so_far[number] for number in range(len(counts))]
        assert epoch <= timeline.epochs_at(index) < epoch + 1 and timeline.epochs_at(index) > before
        before = timeline.epochs_at(index)
        so_far[dataset] += 1
    for epochs in (1, 2, 0.5, 1.25, 3):
        reached = timeline.micro_batches_of(epochs)
        if reached < 120 and reached != timeline.end:
            assert timeline.epochs_at(reached) >= epochs - 1e-9
            assert reached == 0 or timeline.epochs_at(reached - 1) < epochs
    if timeline.end is not None:
        with pytest.raises(IndexError, match="no dataset is shown"):
            timeline.at(timeline.end)
        if timeline.stretches:
            assert timeline.epochs_at(timeline.end) == timeline.stretches[-1].epoch + timeline.stretches[-1].epochs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), MODES, st.integers(0, 99), st.integers(1, 3))
def test_windows_without_bounds_change_nothing(counts, mode, seed, per_step):
    weights = [Fraction(1)] * len(counts)
    plain = Timeline(counts, weights, mode, seed)
    told = Timeline(counts, weights, mode, seed, [Window(0, 1)] * len(counts), per_step)
    assert [plain.at(index) for index in range(3 * sum(counts))] == [told.at(index) for index in range(3 * sum(counts))]
    assert len(plain.stretches) == 1 and plain.end is None


def test_a_start_inside_an_epoch_is_mixed_into_what_is_left_of_it():
    timeline = Timeline([10, 6], [Fraction(1)] * 2, "auto-weighting", 0, [Window(), Window(start_step=6)])
    first = [dataset for epoch, dataset, _ in course(timeline, 60) if epoch == 0]
    assert first[:5] == [0] * 5 and Counter(first) == {0: 10, 1: 6}
    assert [stretch.epochs for stretch in timeline.stretches] == [1, 1, None]
    assert (timeline.epochs_at(16), timeline.epochs_at(8)) == (1.0, 0.5)


def test_an_end_inside_an_epoch_leaves_out_what_was_to_come():
    timeline = Timeline([10, 10], [Fraction(1)] * 2, "uniform", 0, [Window(), Window(end_step=6)])
    first = [dataset for epoch, dataset, _ in course(timeline, 60) if epoch == 0]
    assert Counter(first)[0] == 10 and 0 < Counter(first)[1] <= 6 and not any(first[6:])


def test_an_end_for_all_ends_the_timeline():
    timeline = Timeline([4], [Fraction(1)], "uniform", 0, [Window(end_epoch=3)])
    assert timeline.end == 12 and timeline.micro_batches_of(9) == 12 and len(course(timeline)) == 12
    assert Timeline([4], [Fraction(1)], "uniform", 0, [Window(start_epoch=2)]).end == 0, (
        "nothing is there to begin with"
    )


def test_bounds_far_away_cost_nothing():
    begin = time.thread_time()
    shown = [Window(), Window(start_step=10**9, end_step=10**9 + 5), Window(start_epoch=10**8)]
    timeline = Timeline([1000, 10**6, 3], [Fraction(1)] * 3, "auto-weighting", 0, shown)
    assert timeline.at(10**8)[0] == 10**5 and timeline.at(10**12)[1] in (0, 2)
    assert len(timeline.stretches) < 12 and time.thread_time() - begin < 5


def test_what_makes_no_timeline_is_refused():
    with pytest.raises(ValueError, match="auto-weighting or uniform"):
        Timeline([1], [Fraction(1)], "fair", 0)
    with pytest.raises(ValueError, match="above 0"):
        Timeline([1], [Fraction(0)], "uniform", 0)
