"""validation_method external-script: a command of the user's draws, from the newest checkpoint."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sana_tune.config.commands import words_of
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.train.step import Parts
from sana_tune.train.validate import Lost
from sana_tune.watch.events import Noticed, Validated

_PICTURES = (".png", ".webp", ".jpg", ".jpeg")


class ScriptValidator:
    """Runs the command where pictures would be drawn. One that fails is told and counted; the run goes on.

    values: what its placeholders stand for at a position. folder: where pictures that it leaves are found.
    background: the run does not wait for it; what became of it is told at the next validation and at the end.
    first: whether this process runs it. together: waits for the other processes, outside of a collective operation,
    so that a script may take its time. base, startup: as of `validate.Validator`.
    """

    from_files = True

    def __init__(
        self,
        command: str,
        values: Callable[[Progress], Mapping[str, str]],
        folder: Path,
        *,
        background: bool = False,
        first: bool = True,
        base: bool = True,
        startup: bool = False,
        together: Callable[[str], object] = lambda what: None,
    ):
        self._command, self._values, self._folder = command, values, folder
        self._together = together
        self._background, self._first, self._base, self._startup = background, first, base, startup
        self._running: list[tuple[Progress, subprocess.Popen[bytes]]] = []
        self._drawn_step: int | None = None
        self._lost = Lost()

    def start(self, parts: Parts, progress: Progress) -> Validated:
        """As `Validator.start`."""
        wanted = self._startup or (self._base and progress.step == 0)
        return self.run(parts, progress) if wanted else Validated(progress, ())

    def finish(self, parts: Parts, progress: Progress) -> Validated:
        """As `Validator.finish`."""
        return Validated(progress, ()) if self._drawn_step == progress.step else self.run(parts, progress)

    def run(self, parts: Parts, progress: Progress) -> Validated:
        """Run the command, in the first process. The files are the pictures in the folder that it made or changed."""
        self._drawn_step = progress.step
        done = self._run(progress) if self._first else Validated(progress, ())
        if not self._background:
            self._together("validation_external_script")
        return done

    def _run(self, progress: Progress) -> Validated:
        failed = self._ended()
        started, before = time.perf_counter(), self._pictures()
        words = words_of(self._command, self._values(progress))
        log.info("Running validation_external_script at step %d: %s", progress.step, words[0])
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        except (OSError, ValueError) as error:
            return Validated(progress, (), (*failed, self._failure(progress, str(error))))
        self._running.append((progress, process))
        if not self._background:
            process.wait()
        failed += self._ended()
        after = self._pictures()
        files = tuple(sorted(str(path) for path in after if after[path] != before.get(path)))
        return Validated(progress, files, failed, time.perf_counter() - started)

    def lost(self) -> tuple[Noticed, ...]:
        """Which of the commands failed; those that still run are waited for."""
        for _, process in self._running:
            process.wait()
        self._ended()
        return self._lost.told()

    def _ended(self) -> tuple[str, ...]:
        """Forget the commands that have ended. Answers those that failed."""
        ended = [each for each in self._running if each[1].poll() is not None]
        self._running = [each for each in self._running if each not in ended]
        return tuple(
            self._failure(progress, f"it ended with exit code {process.returncode}")
            for progress, process in ended
            if process.returncode
        )

    def _failure(self, progress: Progress, reason: str) -> str:
        self._lost.add(progress, [("validation_external_script", reason)])
        return f"validation_external_script of step {progress.step}: {reason}"

    def _pictures(self) -> dict[Path, tuple[int, int]]:
        """The pictures in the folder, with what changes when one is written anew."""
        if not self._folder.is_dir():
            return {}
        found = (path for path in self._folder.iterdir() if path.suffix.lower() in _PICTURES)
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in found}
