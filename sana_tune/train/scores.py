"""Scores of validation pictures, as they are drawn: each against its prompt, and the means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.prompts import slugs
from sana_tune.watch.events import Event, Measured, Validated
from sana_tune.watch.sinks import Watcher

_NAME = re.compile(r"step_\d+_(?P<slug>.+)_\d+_\d+x\d+(?P<ema>_ema)?")
_FAILURES = (RuntimeError, ValueError, OSError, UserError)  # out of memory is a RuntimeError


class Scorer(Protocol):
    """Scores pictures against prompts; model.score.ClipScorer."""

    def is_cut(self, prompt: str) -> bool: ...
    def score(self, pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]: ...
    def free(self) -> None: ...


class Scores:
    """Scores the files of a validation.

    prompts: name → text. load: gets the scorer, which is freed each time. read: a file as a picture; what it raises
    besides OSError is an error of ours.
    """

    def __init__(self, prompts: Mapping[str, str], load: Callable[[], Scorer], read: Callable[[Path], Any]):
        self._prompts = {short: prompts[name] for name, short in slugs(list(prompts)).items()}
        self._load = load
        self._read = read
        self._told: set[str] = set()  # prompts of which it was said that they are cut

    def run(self, drawn: Validated) -> Measured | None:
        """The scores of the pictures that were drawn; None when there are none, or when scoring fails."""
        found = [(path, *place) for path in map(Path, drawn.files) if (place := self.place(path)) is not None]
        if not found:
            return None
        try:
            scores = self._scores([path for path, _, _ in found], [self._prompts[slug] for _, _, slug in found])
        except _FAILURES as error:
            log.warning("the pictures of step %d could not be scored: %s", drawn.progress.step, _first_line(error))
            log.debug("scoring failed", exc_info=error)
            return None
        return Measured(
            drawn.progress, told((view, slug, score) for (_, view, slug), score in zip(found, scores, strict=True))
        )

    def place(self, path: Path) -> tuple[str, str] | None:
        """(raw or ema, slug of the prompt) of a file; None for what is no picture of a prompt, or of the empty one."""
        match = _NAME.fullmatch(path.stem)
        if match is None or not self._prompts.get(match["slug"]):
            return None
        return "ema" if match["ema"] else "raw", match["slug"]

    def _scores(self, paths: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        scorer = self._load()
        try:
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._told and scorer.is_cut(prompt):
                    self._told.add(prompt)
                    log.warning("CLIP reads the first part of this prompt alone, and scores that: %s", prompt)
            return scorer.score([self._read(path) for path in paths], prompts)
        finally:
            scorer.free()


def told(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """clip/<view>: the mean over all pictures, and clip/<view>/<slug>: over those of a prompt."""
    groups: dict[str, list[float]] = {}
    for view, slug, score in scores:
        groups.setdefault(f"clip/{view}", []).append(score)
        groups.setdefault(f"clip/{view}/{slug}", []).append(score)
    ordered = sorted(groups, key=lambda name: name.count("/"))
    return {name: math.fsum(groups[name]) / len(groups[name]) for name in ordered}


class Scored(Watcher):
    """A watcher that has pictures scored right after they were told, and tells the scores."""

    def __init__(self, watcher: Watcher, scores: Scores):
        super().__init__(())
        self._watcher = watcher
        self.seen = watcher.seen
        self._scores = scores

    def emit(self, event: Event) -> None:
        self._watcher.emit(event)
        if isinstance(event, Validated) and (found := self._scores.run(event)) is not None:
            self._watcher.emit(found)

    def close(self) -> None:
        self._watcher.close()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
