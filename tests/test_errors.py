"""Problems are told all at once, in the user's words."""

from __future__ import annotations

import signal

import pytest

from sana_tune.errors import Interrupted, Problem, UserError, gather

TYPO = Problem("config.json: seed", "must be an integer; found 'x'", "write a number")
BARE = Problem("pictures", "the folder does not exist")


def test_a_problem_says_where_what_and_what_to_do():
    assert str(TYPO) == "config.json: seed: must be an integer; found 'x'\n  → write a number"
    assert str(BARE) == "pictures: the folder does not exist"


def test_an_error_carries_all_problems_and_at_least_one():
    error = UserError(TYPO, BARE)
    assert error.problems == (TYPO, BARE) and str(error) == f"{TYPO}\n{BARE}"
    with pytest.raises(ValueError, match="at least one"):
        UserError()


def test_gather_collects_what_checks_raise_and_hands_on_what_they_answer():
    def wrong() -> int:
        raise UserError(TYPO, BARE)

    problems = [BARE]
    assert gather(problems, lambda: 7) == 7 and problems == [BARE]
    assert gather(problems, wrong) is None and problems == [BARE, TYPO, BARE]
    with pytest.raises(ZeroDivisionError):
        gather(problems, lambda: 1 // 0)


def test_an_interruption_has_the_shells_exit_code():
    assert Interrupted(signal.SIGINT).exit_code == 130
    assert Interrupted(signal.SIGTERM).exit_code == 143
