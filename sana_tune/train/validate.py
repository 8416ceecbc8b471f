"""Validation pictures: every prompt at every size, with the raw weights and the average, as files of telling names.

And one contact sheet a step: each picture beside those of the base model and of the validation before.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sana_tune.data.records import digest
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.prompts import Prompt, slugs
from sana_tune.store import write_atomically
from sana_tune.train.step import Parts
from sana_tune.watch.events import Noticed, Validated

if TYPE_CHECKING:
    import numpy as np

# What drawing one picture may fail with (out of memory is a RuntimeError) without ending the run.
FAILURES = (RuntimeError, ValueError, ArithmeticError, OSError, UserError)
_LISTED = 5


@dataclass(frozen=True)
class Picture:
    """One picture to draw: the prompt's name and texts (final), the size in px, the seed, and how the sampler draws it.

    slug: the name as it stands in file names. index: the picture's number among those of its prompt and size.
    """

    name: str
    prompt: str
    width_px: int
    height_px: int
    seed: int
    index: int
    slug: str = ""
    negative: str = ""
    steps: int = 20
    guidance: float = 4.5
    rescale: float = 0.0
    sampler: str = "dpm++"


def pictures_of(prompts: Mapping[str, Prompt], sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Picture]:
    """Every picture of the prompts. sizes: (width, height) in px for those that name none. seed: likewise."""
    names = slugs(list(prompts))
    return [
        Picture(
            name=name,
            prompt=prompt.text,
            width_px=width,
            height_px=height,
            seed=(seed if prompt.seed is None else prompt.seed) + index,
            index=index,
            slug=names[name],
            negative=prompt.negative,
            steps=prompt.steps,
            guidance=prompt.guidance,
            rescale=prompt.rescale,
            sampler=prompt.sampler,
        )
        for name, prompt in prompts.items()
        for width, height in prompt.sizes or sizes
        for index in range(prompt.images)
    ]


class Drawing(Protocol):
    """One picture with the weights the transformer holds right now → [height, width, 3] uint8.

    seen: whether its half-finished states are to be shown.
    """

    def __call__(self, picture: Picture, progress: Progress, *, seen: bool) -> np.ndarray: ...


Row = tuple[str, str, Sequence[bytes | None]]  # of a contact sheet: name, a line about it, files or none


class Validator:
    """Draws the pictures of a run.

    folder:  where the files go (validation_images/ of the run).
    draw:    makes one picture. encode: its pixels → the bytes of a file of kind `extension`.
    sheet:   names of columns and rows of files → the bytes of a PNG file; None = no contact sheets.
    base:    whether `start` draws the untrained model's pictures. startup: whether it draws wherever the run starts.
    randomised: the seed of the run from which other seeds are made at each validation; None = the same ones.
    stopped: asked before each picture; true ends the drawing early.
    release: lets go of what drawing holds (the VAE) after each run.
    rank, ranks, gather: of so many processes this one draws every `ranks`-th picture; gather gives what all of them
             hand to it, in the order of their ranks. The contact sheet is the first one's, from files that all see.
    writes:  whether this process writes what it draws (where all draw each picture together, one of them does).
    collective: whether all processes draw each picture together: where drawing one fails, the run ends then.
    """

    from_files = False

    def __init__(
        self,
        folder: Path,
        pictures: Sequence[Picture],
        draw: Drawing,
        encode: Callable[[np.ndarray], bytes],
        *,
        sheet: Callable[[Sequence[str], Sequence[Row]], bytes] | None = None,
        base: bool = True,
        startup: bool = False,
        randomised: int | None = None,
        extension: str = "png",
        stopped: Callable[[], bool] = lambda: False,
        release: Callable[[], None] = lambda: None,
        rank: int = 0,
        ranks: int = 1,
        gather: Callable[[Any], Sequence[Any]] = lambda value: [value],
        writes: bool = True,
        collective: bool = False,
    ):
        self._writes, self._collective = writes, collective
        self.folder = folder
        self.pictures = list(pictures)
        self._draw, self._encode, self._sheet = draw, encode, sheet
        self._stopped, self._release = stopped, release
        self._base, self._startup, self._randomised = base, startup, randomised
        self._extension = extension
        self._rank, self._ranks, self._gather = rank, ranks, gather
        self._drawn_step: int | None = None
        self._lost = Lost()

    def start(self, parts: Parts, progress: Progress) -> Validated:
        """The base model's pictures when the run is at its start, those of where it goes on, as wanted."""
        wanted = self._startup or (self._base and progress.step == 0)
        return self.run(parts, progress) if wanted else Validated(progress, ())

    def finish(self, parts: Parts, progress: Progress) -> Validated:
        """The final pictures, unless this very step's were just drawn."""
        return Validated(progress, ()) if self._drawn_step == progress.step else self.run(parts, progress)

    def run(self, parts: Parts, progress: Progress) -> Validated:
        """Draw everything. A picture that fails is told in `failed`; the others and the run go on."""
        # at the start the average still is the base model, whichever of the two is to be shown
        return self.drawn(progress, parts.ema.views() if progress.step else iter([("", nullcontext())]))

    def drawn(self, progress: Progress, views: Iterator[tuple[str, AbstractContextManager[None]]]) -> Validated:
        """Draw everything with each of `views`: (suffix of the file names, a context in which the model is so)."""
        started = time.perf_counter()
        pictures = [self._seeded(picture, progress) for picture in self.pictures]
        done: list[tuple[int, str, str]] = []  # place, file, and why it failed ("" = it did not)
        suffixes: list[str] = []
        log.info("Drawing the pictures of step %d", progress.step)
        try:
            for suffix, weights in views:
                suffixes.append(suffix)
                with weights:
                    for number in range(self._rank, len(pictures), self._ranks):
                        if self._stopped():
                            break
                        path = self.path(pictures[number], progress, suffix)
                        failure = self._one(pictures[number], path, progress, seen=len(suffixes) == 1)
                        done.append(((len(suffixes) - 1) * len(pictures) + number, str(path), failure))
        finally:
            self._release()
        everyones = sorted(each for part in self._gather(done) for each in part)
        self._drawn_step = progress.step
        files = tuple(path for _, path, failure in everyones if not failure)
        failed = tuple(f"{Path(path).name}: {failure}" for _, path, failure in everyones if failure)
        self._lost.add(
            progress, [(pictures[place % len(pictures)].name, failure) for place, _, failure in everyones if failure]
        )
        sheet = ""
        if files and self._sheet is not None and self._rank == 0 and self._writes:
            sheet, problem = self._sheet_of(pictures, progress, suffixes)
            failed += (problem,) if problem else ()
        return Validated(progress, files, failed, time.perf_counter() - started, sheet)

    def lost(self) -> tuple[Noticed, ...]:
        """What could not be drawn in the whole run, to be told at its end; nothing where all could."""
        return self._lost.told()

    def path(self, picture: Picture, progress: Progress, suffix: str = "") -> Path:
        """step_<step>_<slug>_<i>_<WxH>[_ema].<ext>"""
        return self.folder / f"step_{progress.step}_{self._rest(picture, suffix)}"

    def _rest(self, picture: Picture, suffix: str) -> str:
        size = f"{picture.width_px}x{picture.height_px}"
        return f"{picture.slug}_{picture.index}_{size}{suffix}.{self._extension}"

    def _seeded(self, picture: Picture, progress: Progress) -> Picture:
        """The picture with the seed of this validation."""
        if self._randomised is None:
            return picture
        drawn = int(digest("validation", self._randomised, progress.step, picture.seed)[:8], 16)
        return replace(picture, seed=drawn)

    def _one(self, picture: Picture, path: Path, progress: Progress, *, seen: bool) -> str:
        """Draw one and write it. Answers why that failed, or ""."""
        try:
            pixels = self._draw(picture, progress, seen=seen)
        except FAILURES as error:
            if self._collective:  # the others would wait for it in the middle of a picture
                raise
            return _failure(path, error)
        try:
            if self._writes:
                write_atomically(path, self._encode(pixels))
        except FAILURES as error:
            return _failure(path, error)
        return ""

    # ---- the contact sheet ----

    def _sheet_of(self, pictures: Sequence[Picture], progress: Progress, suffixes: Sequence[str]) -> tuple[str, str]:
        """Write the sheet of a step. Answers its path, or "" and why that failed."""
        path = self.folder / f"step_{progress.step}_contact_sheet.png"
        try:
            before = self._steps_before(progress.step)
            columns = self._columns(progress, suffixes, before)
            rows = []
            for picture in pictures:
                cells = [_read(self.folder, step, self._rest(picture, suffix)) for _, step, suffix in columns]
                rows.append((picture, cells))
            kept = [n for n in range(len(columns)) if any(cells[n] is not None for _, cells in rows)]
            table = [(_title(picture), _about(picture), [cells[n] for n in kept]) for picture, cells in rows]
            assert self._sheet is not None
            write_atomically(path, self._sheet([columns[n][0] for n in kept], table))
        except FAILURES as error:
            return "", f"{path.name}: {type(error).__name__}: {first_line(error)}"
        return str(path), ""

    def _steps_before(self, step: int) -> list[int]:
        """The steps after the start and before `step` of which there are pictures, the latest first."""
        if not self.folder.is_dir():
            return []
        names = (re.match(r"step_(\d+)_", path.name) for path in self.folder.iterdir())
        return sorted({int(found[1]) for found in names if found and 0 < int(found[1]) < step}, reverse=True)

    def _columns(
        self, progress: Progress, suffixes: Sequence[str], before: Sequence[int]
    ) -> list[tuple[str, int, str]]:
        """Title, step and suffix of each column: base, before, now, EMA."""
        if progress.step == 0:
            return [("base model", 0, "")]
        raw = "" if "" in suffixes else suffixes[0]
        columns = [("base model", 0, "")]
        columns += [(f"before: step {step}{' EMA' if raw else ''}", step, raw) for step in before[:1]]
        columns += [(f"step {progress.step}{' EMA' if each else ''}", progress.step, each) for each in suffixes]
        return columns


def _failure(path: Path, error: Exception) -> str:
    log.debug("drawing %s failed", path.name, exc_info=error)
    return f"{type(error).__name__}: {first_line(error)}"


def _read(folder: Path, step: int, rest: str) -> bytes | None:
    """The file of a picture, if it is there."""
    path = folder / f"step_{step}_{rest}"
    return path.read_bytes() if path.is_file() else None


def _title(picture: Picture) -> str:
    return f"{picture.name}  {picture.width_px}x{picture.height_px}  seed {picture.seed}"


def _about(picture: Picture) -> str:
    return picture.prompt or "(the empty prompt)"


class Lost:
    """Counts what failed over a run."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._reasons: dict[str, str] = {}
        self._progress = Progress()

    def add(self, progress: Progress, failures: Sequence[tuple[str, str]]) -> None:
        """(name, reason) of each failure."""
        self._progress = progress
        self._counts.update(name for name, _ in failures)
        self._reasons.update(failures)

    def told(self) -> tuple[Noticed, ...]:
        """One notice about all of them."""
        if not self._counts:
            return ()
        names = [f"{name} ({count}: {self._reasons[name]})" for name, count in self._counts.most_common(_LISTED)]
        more = f" and {len(self._counts) - _LISTED} more prompts" if len(self._counts) > _LISTED else ""
        total = self._counts.total()
        what = f"{total} validation picture{'s' * (total != 1)} could not be drawn: {'; '.join(names)}{more}"
        return (Noticed(self._progress, what),)


class NoValidator:
    """Stands where no pictures are wanted."""

    from_files = False

    def start(self, parts: Parts, progress: Progress) -> Validated:
        return Validated(progress, ())

    def run(self, parts: Parts, progress: Progress) -> Validated:
        return Validated(progress, ())

    def finish(self, parts: Parts, progress: Progress) -> Validated:
        return Validated(progress, ())

    def lost(self) -> tuple[Noticed, ...]:
        return ()


def first_line(error: Exception) -> str:
    """An error's message without what follows its first line (CUDA's go on for pages)."""
    return str(error).partition("\n")[0]
