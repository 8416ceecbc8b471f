"""`sana_tune configure`: asks the questions, shows what follows, writes the files, checks them.

Nothing is written before the last question is answered; then the files are replaced one by one, config.json last.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sana_tune.cli.drafts import Draft, draft, find_files, other_settings, read_existing, settings_for, shown
from sana_tune.cli.questions import QUESTIONS, Machine, Question, State
from sana_tune.cli.recipe import Answers, estimated_bytes, reasons
from sana_tune.cli.terminal import Asker, Terminal
from sana_tune.config.files import find_config, read_environment_files
from sana_tune.errors import Problem, UserError
from sana_tune.hardware import gpus, ram_bytes
from sana_tune.plan import human_bytes
from sana_tune.store import write_atomically

UNNUMBERED = ("subject",)  # belongs to the question before it
BACK = "b"
LONG_DEFAULT = 40  # characters; a longer one has a line of its own
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Wishes:
    """The command line. given: key of a question → its flag's text. yes: ask nothing. overwrite: replace files."""

    given: Mapping[str, str]
    config: str | None = None
    env: str | None = None
    yes: bool = False
    overwrite: bool = False


def configure(wishes: Wishes, asker: Asker | None = None, machine: Machine | None = None) -> int:
    """Make or change the two settings files. Answers the exit code; raises UserError with what is wrong.

    asker, machine: the terminal and the machine this runs on, unless given.
    """
    if asker is None and not wishes.yes and not sys.stdin.isatty():
        raise UserError(_no_terminal(wishes))
    asker = asker or Terminal()
    written: list[Path] = []
    try:
        return _configure(wishes, asker, machine or Machine(gpus(), ram_bytes()), written)
    except (KeyboardInterrupt, EOFError):
        asker.say()
        names = ", ".join(map(str, written))
        asker.say(f"the check was interrupted; {names} are written" if written else "nothing was written")
        return INTERRUPTED


def _configure(wishes: Wishes, asker: Asker, machine: Machine, written: list[Path]) -> int:
    cwd = Path.cwd()
    environ = {**os.environ, **read_environment_files(wishes.env, os.environ, cwd)}
    read_from, write_to = find_files(wishes.config, wishes.env, environ, cwd)
    existing = read_existing(read_from, environ) if read_from else None
    state = State(machine, existing, cwd, environ, wishes.given)
    if not wishes.yes:
        _greet(asker, state, read_from, write_to)
    (answer_all if wishes.yes else ask_all)(asker, state)
    answers = answers_of(state)
    asker.say()
    take = _recommendation(asker, state, answers, ask=not wishes.yes)
    made: Draft | None = draft(state, answers, write_to, take)
    if wishes.yes or wishes.overwrite:
        _tell(asker, made)
        if made.in_the_way and not wishes.overwrite:
            raise UserError(*map(_in_the_way, made.in_the_way))
    else:
        made = _confirmed(asker, state, answers, made, take)
    if made is None:
        asker.say("nothing was written")
        return 0
    with _uninterrupted():
        for path, content in made.files:
            write_atomically(path, content)
            written.append(path)
    return _check(asker, made, environ, cwd)


def _no_terminal(wishes: Wishes) -> Problem:
    missing = [
        f"{question.flag} …" for question in QUESTIONS if question.must_name and question.key not in wishes.given
    ]
    what = "configure asks questions, and standard input is no terminal"
    fix = f"answer by flags: sana_tune configure --yes {' '.join(missing)}".rstrip()
    return Problem("configure", what, f"{fix} (others: sana_tune configure --help)")


def _greet(asker: Asker, state: State, read_from: Path | None, write_to: Path) -> None:
    asker.say("A few questions, then the settings files are written and checked.", style="bold")
    asker.say("Enter takes the answer in [ ], ? explains, b goes one question back, Ctrl-C leaves and writes nothing.")
    for line in state.machine.lines():
        asker.say(line)
    if read_from is not None:
        asker.say(f"{shown(read_from, state.cwd)} is there: its values are the answers in [ ], all else in it is kept.")
        if read_from.suffix != ".json":
            asker.say(f"The result is written as JSON: {shown(write_to, state.cwd)}.")


# ---- asking ----


def ask_all(asker: Asker, state: State) -> None:
    """Ask every question that applies and was not answered by a flag, with the way back."""
    typed: dict[str, str] = {}
    asked: list[int] = []
    place = 0
    while place < len(QUESTIONS):
        question = QUESTIONS[place]
        if not question.applies(state):
            state.answers.pop(question.key, None)
        elif question.key in state.given:
            _answer(asker, question, state.given[question.key], state)
        elif ask_one(asker, question, state, typed):
            asked.append(place)
        elif asked:
            place = asked.pop()
            continue
        else:
            asker.say("This is the first question.", indent=2)
            continue
        place += 1


def ask_one(asker: Asker, question: Question, state: State, typed: dict[str, str]) -> bool:
    """Ask until the answer is one. False for the way back. typed: answers that were typed before, by key."""
    asker.say()
    asker.say(f"{_number(question)}{question.title}", style="bold")
    asker.say(question.why, indent=2)
    for line in question.choices(state):
        asker.say(line)
    default = typed.get(question.key) or question.default(state)
    while True:
        prompt = "  > "
        if default is not None and len(default) <= LONG_DEFAULT:
            prompt = f"  [{default}] > "
        elif default is not None:
            asker.say(f"[{default}]", indent=2)
        try:
            text = asker.ask(prompt, is_path=question.is_path)
        except ValueError as error:
            asker.say(f"{error}", style="yellow", indent=2)
            continue
        if text == "?":
            asker.say(question.more or question.why, indent=2)
        elif text.lower() in (BACK, "back"):
            return False
        elif not text and default is None:
            asker.say("There is no default: please answer.", style="yellow", indent=2)
        elif _understood(asker, question, text or default or "", state):
            if text and typed.get(question.key) != text:
                _forget_later(question, typed)  # they may have followed from another answer here
                typed[question.key] = text
            return True


def _forget_later(question: Question, typed: dict[str, str]) -> None:
    for later in QUESTIONS[QUESTIONS.index(question) + 1 :]:
        typed.pop(later.key, None)


def _understood(asker: Asker, question: Question, text: str, state: State) -> bool:
    """Take an answer; False when it is none, after saying why."""
    try:
        _answer(asker, question, text, state)
    except UserError as error:
        for problem in error.problems:
            asker.say(problem.what, style="yellow", indent=2)
            if problem.fix:
                asker.say(f"→ {problem.fix}", indent=2)
        return False
    return True


def _answer(asker: Asker, question: Question, text: str, state: State) -> None:
    state.answers[question.key] = question.read(text, state)
    for line in question.said(state.answers[question.key], state):
        asker.say(line, indent=2)


def _number(question: Question) -> str:
    numbered = [each.key for each in QUESTIONS if each.key not in UNNUMBERED]
    if question.key in UNNUMBERED:
        return "      "
    return f"{numbered.index(question.key) + 1:>2}/{len(numbered)} "


def answer_all(asker: Asker, state: State) -> None:
    """Answer every question by its flag or its default. Raises UserError with everything that is missing or wrong."""
    problems: list[Problem] = []
    for question in QUESTIONS:
        if any(need not in state.answers for need in question.needs) or not question.applies(state):
            continue
        text = state.given.get(question.key) or _default_unasked(question, state)
        if text is None:
            problems.append(
                Problem(question.flag, f"must be given: {question.title.lower()} has no default", question.why)
            )
            continue
        try:
            state.answers[question.key] = question.read(text, state)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    for question in (question for question in QUESTIONS if question.key in state.answers):
        for line in question.said(state.answers[question.key], state):
            asker.say(f"{question.title}: {line}")


def _default_unasked(question: Question, state: State) -> str | None:
    """The default that nobody needs to see: none where it is a guess."""
    if question.must_name and (state.existing is None or not state.existing.says(question.key)):
        return None
    return question.default(state)


def answers_of(state: State) -> Answers:
    """The answers as one value."""
    return Answers(**{"subject": None, **state.answers})


# ---- what follows from it ----


def _recommendation(asker: Asker, state: State, answers: Answers, *, ask: bool) -> bool:
    """Show what is recommended. Answers whether it is to be taken: always for new files, else as is answered."""
    try:
        settings = settings_for(state, answers)
    except UserError as error:  # an existing file with sizes that do not fit: `check` says it in full
        asker.say(f"No settings can be recommended: {error.problems[0].what}.", style="yellow")
        return False
    need = human_bytes(estimated_bytes(settings, answers.model.facts, answers.resolutions))
    asker.say(f"Recommended for {answers.target}, of which about {need} are used while training:")
    for line in reasons(settings):
        asker.say(line, indent=2)
    if state.existing is None:
        return True
    other = other_settings(state.existing, settings)
    if not other:
        return False
    default = bool({"model", "adapter"} & state.existing.changed(answers)) or "target" in state.given
    asker.say("Your file has otherwise: " + ", ".join(f"{key} {state.existing.get(key)}" for key in other) + ".")
    return _yes(asker, "Take the recommended ones?", default) if ask else default


def _yes(asker: Asker, question: str, default: bool) -> bool:
    while True:
        text = asker.ask(f"{question} [{'y' if default else 'n'}] > ").lower()
        if text in ("", "y", "yes", "n", "no"):
            return default if not text else text.startswith("y")
        asker.say("y or n", indent=2)


def _tell(asker: Asker, made: Draft) -> None:
    """Say what will be written, and what is different in files that are there."""
    for line in made.lines:
        asker.say(line)


def _confirmed(asker: Asker, state: State, answers: Answers, made: Draft, take: bool) -> Draft | None:
    """Ask for leave to write, or for another place; None when it is refused."""
    while True:
        _tell(asker, made)
        if not made.files:
            return made
        default = "y" if not made.not_read else str(made.elsewhere)
        text = asker.ask(f"Write? y, n, or another path for config.json [{default}] > ", is_path=True) or default
        if text.lower() in ("y", "yes"):
            return made
        if text.lower() in ("n", "no", BACK, "q"):
            return None
        _, write_to = find_files(text, None, state.environ, state.cwd)
        made = draft(state, answers, write_to, take)


def _in_the_way(path: Path) -> Problem:
    return Problem(
        str(path), "the file is there already", "replace it with --overwrite, or name another: --config PATH"
    )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits in here: these are milliseconds, and the files belong together."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check(asker: Asker, made: Draft, environ: Mapping[str, str], cwd: Path) -> int:
    """Check the files as they are now, and say what comes next."""
    from sana_tune.check import Report, look_over
    from sana_tune.cli.check import show
    from sana_tune.cli.loading import load_asked

    path = made.config_path
    asker.say()
    asker.say("Checking them:", style="bold")
    try:
        loaded, notes = load_asked((), str(path))
        report = look_over(loaded, notes)
    except UserError as error:
        report = Report(problems=error.problems)
    show(replace(report, settings=()))  # they were all asked or recommended a moment ago
    asker.say()
    flag = "" if _is_found(path, environ, cwd) else f" --config {shlex.quote(str(shown(path, cwd)))}"
    if not report.ok:
        asker.say(f"The files are written. Mend what is wrong, then: sana_tune check{flag}", style="bold")
        return 1
    asker.say(f"Next: sana_tune train{flag}", style="bold")
    return 0


def _is_found(path: Path, environ: Mapping[str, str], cwd: Path) -> bool:
    """Whether `train` takes this file without being told."""
    try:
        found, _ = find_config(None, None, None, environ, cwd)
    except UserError:
        return False
    return found is not None and os.path.abspath(found) == os.path.abspath(path)
