"""Previews: every prompt at every size, with the raw weights and with the average, as files of telling names."""

from __future__ import annotations

import hashlib
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.store import write_atomically
from sana_tune.train.crew import ALONE, Crew
from sana_tune.train.step import Parts
from sana_tune.watch.events import Validated

if TYPE_CHECKING:
    import numpy as np

# What drawing one picture may fail with (out of memory is a RuntimeError) without ending the run.
_FAILURES = (RuntimeError, ValueError, ArithmeticError, OSError, UserError)
_SLUG_LENGTH = 60


@dataclass(frozen=True)
class Picture:
    """One picture to draw: the prompt's name and text, the size in px, and the seed."""

    name: str
    prompt: str
    width_px: int
    height_px: int
    seed: int
    index: int


def slug(name: str) -> str:
    """A short name that every file system takes: lower-case ASCII letters, digits and hyphens.

    Where that loses something (accents, other scripts, length) a hash of the name keeps it apart from others.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii").lower()
    short = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if short and short == re.sub(r"[ _]", "-", name) and len(short) <= _SLUG_LENGTH:
        return short
    mark = hashlib.blake2b(name.encode("utf-8"), digest_size=4).hexdigest()
    return f"{short[: _SLUG_LENGTH - 9].strip('-')}-{mark}".lstrip("-")


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A slug for each name, all different."""
    found: dict[str, str] = {}
    for name in names:
        wanted, number = slug(name), 1
        while wanted in found.values():
            number += 1
            wanted = f"{slug(name)}-{number}"
        found[name] = wanted
    return found


class Validator:
    """Draws the previews of a run.

    folder:  where the files go (validation_images/ of the run).
    prompts: name → prompt text; the name (a nickname of the prompt library) makes the file name.
    sizes:   (width, height) in px.
    draw:    one picture with the weights the transformer holds right now → [height, width, 3] uint8.
    encode:  those pixels → the bytes of a file of kind `extension`.
    base:    whether `start` draws the untrained model's pictures.
    stopped: asked before each picture; true ends the drawing early.
    release: lets go of what drawing holds (the VAE) after each run.
    crew:    the processes that share the pictures. writes: whether this one writes those it draws.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Mapping[str, str],
        sizes: Sequence[tuple[int, int]],
        draw: Callable[[Picture], np.ndarray],
        encode: Callable[[np.ndarray], bytes],
        *,
        images_per_prompt: int = 1,
        seed: int = 0,
        base: bool = True,
        extension: str = "png",
        stopped: Callable[[], bool] = lambda: False,
        release: Callable[[], None] = lambda: None,
        crew: Crew = ALONE,
        writes: bool = True,
    ):
        self._crew, self._writes = crew, writes
        self.folder = folder
        self._draw, self._encode, self._stopped, self._release = draw, encode, stopped, release
        self._base, self._extension = base, extension
        self._slugs = slugs(list(prompts))
        self._drawn_step: int | None = None
        self.pictures = [
            Picture(name, prompt, width, height, seed + index, index)
            for name, prompt in prompts.items()
            for width, height in sizes
            for index in range(images_per_prompt)
        ]

    def start(self, parts: Parts, progress: Progress) -> Validated:
        """The base model's pictures, when the run is at its start and they are wanted."""
        return self.run(parts, progress) if self._base and progress.step == 0 else Validated(progress, ())

    def finish(self, parts: Parts, progress: Progress) -> Validated:
        """The final pictures, unless this very step's were just drawn."""
        return Validated(progress, ()) if self._drawn_step == progress.step else self.run(parts, progress)

    def run(self, parts: Parts, progress: Progress) -> Validated:
        """Draw everything. A picture that fails is told in `failed`; the others and the run go on."""
        started = time.perf_counter()
        files: list[str] = []
        failed: list[str] = []
        log.info("Drawing the pictures of step %d", progress.step)
        try:
            # at the start the average still is the base model, whichever of the two is to be shown
            views = parts.ema.views() if progress.step else [("", nullcontext())]
            for suffix, weights in views:
                with weights:
                    for picture in self._crew.share(self.pictures):
                        if self._stopped():
                            break
                        self._one(picture, self.path(picture, progress, suffix), files, failed)
        finally:
            self._release()
        self._drawn_step = progress.step
        parts_drawn = self._crew.gather(f"the pictures of step {progress.step}", [files, failed])
        files, failed = ([name for part in parts_drawn for name in part[kind]] for kind in (0, 1))
        return Validated(progress, tuple(files), tuple(failed), time.perf_counter() - started)

    def path(self, picture: Picture, progress: Progress, suffix: str = "") -> Path:
        """step_<step>_<slug>_<i>_<WxH>[_ema].<ext>"""
        size = f"{picture.width_px}x{picture.height_px}"
        name = f"step_{progress.step}_{self._slugs[picture.name]}_{picture.index}_{size}{suffix}"
        return self.folder / f"{name}.{self._extension}"

    def _one(self, picture: Picture, path: Path, files: list[str], failed: list[str]) -> None:
        try:
            pixels = self._draw(picture)
            if self._writes:
                write_atomically(path, self._encode(pixels))
        except _FAILURES as error:
            log.debug("drawing %s failed", path.name, exc_info=error)
            failed.append(f"{path.name}: {type(error).__name__}: {first_line(error)}")
        else:
            files.append(str(path))


class NoValidator:
    """Stands where no previews are wanted."""

    def start(self, parts: Parts, progress: Progress) -> Validated:
        return Validated(progress, ())

    def run(self, parts: Parts, progress: Progress) -> Validated:
        return Validated(progress, ())

    def finish(self, parts: Parts, progress: Progress) -> Validated:
        return Validated(progress, ())


def first_line(error: Exception) -> str:
    """An error's message without what follows its first line (CUDA's go on for pages)."""
    return str(error).partition("\n")[0]
