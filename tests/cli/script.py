"""Somebody who answers the wizard's questions from a list, and what was said to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sana_tune.cli.questions import Machine, State
from sana_tune.cli.recipe import Answers, Length, ModelChoice, Target
from sana_tune.cli.scan import Scan
from sana_tune.data.geometry import Size
from sana_tune.hardware import Device
from sana_tune.model.facts import from_folder, known
from sana_tune.model.fetch import local_folder

GB = 1_000_000_000
CPU = Machine((), 16 * GB)
RTX = Machine((Device("NVIDIA GeForce RTX 4090", 25_757_220_864, 25_000_000_000),), 64 * GB)
H100 = Machine((Device("NVIDIA H100 80GB HBM3", 85_520_809_984, 85_000_000_000),), 128 * GB)
SANA = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
MOST_QUESTIONS = 80


class Script:
    """An asker: each question takes the next answer, or Enter when none is left. An exception as answer is raised."""

    def __init__(self, *answers: str | BaseException):
        self.answers = list(answers)
        self.said: list[str] = []
        self.prompts: list[str] = []

    def say(self, text: str = "", *, style: str | None = None, indent: int = 0) -> None:
        self.said.append(text)

    def ask(self, prompt: str, *, is_path: bool = False) -> str:
        self.prompts.append(prompt)
        self.said.append(prompt)
        assert len(self.prompts) <= MOST_QUESTIONS, "it asks without end:\n" + self.text
        answer = self.answers.pop(0) if self.answers else ""
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join(self.said)


def model(name: str = SANA) -> ModelChoice:
    """A model of the table, or nano."""
    facts = known(name)
    if facts is None:
        folder = local_folder(name)
        assert folder is not None
        facts = from_folder(folder, name)
    return ModelChoice(name, facts)


def scan_of(count: int = 20, sizes: Iterable[tuple[int, int]] = ((1600, 1200),), **more: Any) -> Scan:
    """What a folder might hold."""
    return Scan(**{"folder": "photos", "pictures": count, "sizes": tuple(Size(*size) for size in sizes), **more})


def answers(**changes: Any) -> Answers:
    """Answers of somebody with a 24 GB GPU and 20 captioned photographs."""
    usual = Answers(
        model=model(),
        pictures=scan_of(with_text=20, texts=("a brown dog in the snow", "a brown dog on a sofa")),
        captions="textfile",
        subject=None,
        target=Target(24 * GB),
        resolutions=(1024,),
        length=Length(steps=500),
        prompt="a brown dog on a beach at sunset, wide angle",
        tracking="none",
        output="output/dog",
    )
    return replace(usual, **changes)


def state(cwd: Path, machine: Machine = CPU, **known_answers: Any) -> State:
    """A state of asking."""
    return State(machine, None, cwd, {}, {}, dict(known_answers))
