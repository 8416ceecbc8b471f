"""What can go wrong, as values: one type for a mistake, one exception that carries all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, told so that it can be mended.

    where: the place in the user's words (a file and key, a dataset, a flag).
    what:  what must hold and what was found.
    fix:   what to do about it.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}"]
        if self.fix:
            lines.append(f"  → {self.fix}")
        return "\n".join(lines)


class UserError(Exception):
    """The user's mistakes, all at once. The command line prints them and ends with exit code 1."""

    def __init__(self, *problems: Problem):
        if not problems:
            raise ValueError("a UserError needs at least one Problem")
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class OthersFailed(UserError):
    """Another process of the run failed, so that this one cannot go on; the other one tells more."""


def gather(problems: list[Problem], check: Callable[[], Value]) -> Value | None:
    """What `check` answers; None when it raises UserError, whose problems join the list."""
    try:
        return check()
    except UserError as error:
        problems += error.problems
        return None


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved what it had. Exit code 128 + signal."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(f"stopped by signal {signal_number}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number
