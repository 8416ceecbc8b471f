from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.train.scores import Scored, Scores, told
from sana_tune.watch.events import Event, Measured, Stopped, Validated
from sana_tune.watch.sinks import Watcher

PROMPTS = {"main": "a cat", "two words": "a dog", "nothing": ""}
FILES = tuple(f"validation_images/step_4_{name}_{index}_64x32{view}.png"
              for name in ("main", "two-words", "nothing") for view in ("", "_ema") for index in (0, 1))  # fmt: skip


@dataclass
class Scorer:
    """Scores a picture by the length of its name and its prompt's, and keeps what it was asked."""

    fails: bool = False
    asked: list[tuple[str, str]] = field(default_factory=list)
    freed: int = 0

    def is_cut(self, prompt: str) -> bool:
        return prompt == "a dog"

    def score(self, pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        if self.fails:
            raise RuntimeError("out of memory\nand a long tale")
        self.asked += zip(pictures, prompts, strict=True)
        return [float(len(picture) + len(prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]

    def free(self) -> None:
        self.freed += 1


def drawn(*files: str) -> Validated:
    return Validated(Progress(4), files)


def scores(scorer: Scorer) -> Scores:
    return Scores(PROMPTS, lambda: scorer, lambda path: path.name)


def test_pictures_are_scored_with_their_own_prompts():
    scorer = Scorer()
    measured = scores(scorer).run(drawn(*FILES, "validation_images/step_4_sheet.png"))
    assert measured is not None and measured.progress == Progress(4)
    assert {prompt for name, prompt in scorer.asked if "_main_" in name} == {"a cat"}
    assert {prompt for name, prompt in scorer.asked if "_two-words_" in name} == {"a dog"}
    assert len(scorer.asked) == 8 and scorer.freed == 1, "the empty prompt has no score, a sheet none either"
    assert set(measured.values) == {
        f"clip/{view}{name}" for view in ("raw", "ema") for name in ("", "/main", "/two-words")
    }
    lengths = [len(Path(file).name) + 5 for file in FILES if "ema" not in file and "nothing" not in file]
    assert measured.values["clip/raw"] == sum(lengths) / 4
    assert measured.values["clip/raw/main"] == lengths[0]


def test_means_are_over_pictures():
    found = told([("raw", "a", 10.0), ("raw", "b", 20.0), ("raw", "a", 30.0), ("ema", "a", 1.0)])
    assert found == {"clip/raw": 20.0, "clip/ema": 1.0, "clip/raw/a": 20.0, "clip/raw/b": 20.0, "clip/ema/a": 1.0}


def test_without_pictures_no_model_is_loaded():
    scorer = Scorer()
    assert scores(scorer).run(drawn()) is None
    assert scores(scorer).run(drawn("validation_images/step_4_nothing_0_64x32.png")) is None
    assert scorer.freed == 0


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of the log."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def test_a_failure_is_told_and_the_run_goes_on(said: list[str]):
    scorer = Scorer(fails=True)
    assert scores(scorer).run(drawn(*FILES)) is None
    assert said[-1] == "the pictures of step 4 could not be scored: out of memory" and scorer.freed == 1


def test_a_prompt_that_is_cut_is_told_once(said: list[str]):
    mine = scores(Scorer())
    mine.run(drawn(*FILES))
    mine.run(drawn(*FILES))
    assert said == ["CLIP reads the first part of this prompt alone, and scores that: a dog"]


def test_the_watcher_tells_scores_right_after_the_pictures():
    @dataclass
    class Heard:
        events: list[Event] = field(default_factory=list)
        closed: int = 0

        def emit(self, event: Event) -> None:
            self.events.append(event)

        def close(self) -> None:
            self.closed += 1

    heard = Heard()
    watcher = Scored(Watcher([heard]), scores(Scorer()))
    for event in (drawn(*FILES), drawn(), Stopped(Progress(4))):
        watcher.emit(event)
    watcher.close()
    assert [type(event) for event in heard.events] == [Validated, Measured, Validated, Stopped] and heard.closed == 1
