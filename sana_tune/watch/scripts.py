"""The user's own programs after a checkpoint or an upload: run aside, without a shell, their output in the log.

A command is split into words once, as a shell would quote them; placeholders are filled in afterwards, each inside its
word, so that nothing in a prompt or a path is ever read as a command. https://docs.python.org/3/library/shlex.html
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from sana_tune.config.schema import WatchConfig
from sana_tune.config.watching import script_words
from sana_tune.errors import Problem
from sana_tune.log import log
from sana_tune.watch.background import Worker
from sana_tune.watch.events import Event, Finished, Saved
from sana_tune.watch.uploads import Uploaded

WAITING = 16  # runs of scripts that may wait
FINISH_S = 600.0  # for scripts to end, once the run has
_LAST_LINES = 5  # of a script that failed, for the console; the log has all


class Scripts:
    """Runs post_checkpoint_script and post_upload_script. values: of the placeholders that are the same all along.

    uploads: whether anything is uploaded; if not, post_upload_script runs once, when the run is finished.
    """

    def __init__(self, settings: WatchConfig, values: Mapping[str, str], *, uploads: bool, finish_s: float = FINISH_S):
        self._settings, self._values, self._uploads, self._finish_s = settings, dict(values), uploads, finish_s
        self._worker = Worker("scripts", WAITING, self._broke)

    def emit(self, event: Event) -> None:
        """Queue what is to be run after the event."""
        match event:
            case Saved(progress=progress, path=path):
                place = {"local_checkpoint_path": os.path.abspath(path), "global_step": str(progress.step)}
                self._queue("post_checkpoint_script", self._settings.post_checkpoint_script, place)
            case Finished(progress=progress, pipeline=pipeline) if not self._uploads:
                place = {"local_checkpoint_path": os.path.abspath(pipeline) if pipeline else ""}
                place["global_step"] = str(progress.step)
                self._queue("post_upload_script", self._settings.post_upload_script, place)

    def uploaded(self, upload: Uploaded) -> None:
        """Queue what is to be run after an upload."""
        place = {
            "local_checkpoint_path": os.path.abspath(upload.folder),
            "global_step": str(upload.step),
            "huggingface_path": upload.repository,
            "remote_checkpoint_path": upload.url,
        }
        self._queue("post_upload_script", self._settings.post_upload_script, place)

    def close(self) -> None:
        """Wait for the scripts, for a while; one that still runs then is left to itself."""
        if pending := self._worker.pending:
            log.info("Waiting for %d scripts of yours", pending) if pending > 1 else log.info("Waiting for your script")
        if not self._worker.finish(self._finish_s):
            log.warning("a script still runs after %.0f s and is left to itself", self._finish_s)

    def _queue(self, name: str, command: str | None, place: Mapping[str, str]) -> None:
        if command is None:
            return
        words = script_words(command, {**self._values, **place})
        if not self._worker.put(lambda: self._run(name, words)):
            log.warning("%s: not run for step %s, too many still wait", name, place["global_step"])

    def _run(self, name: str, words: list[str]) -> None:
        """Run one program to its end. Its lines go to the log, and the last ones are told when it fails."""
        log.debug("%s: %s", name, shlex.join(words))
        last: deque[str] = deque(maxlen=_LAST_LINES)
        with subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the run
        ) as program:
            for line in program.stdout or ():
                log.debug("%s: %s", name, line.rstrip())
                last.append(line.rstrip())
            code = program.wait()
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            log.warning("%s %s; the run goes on%s", name, how, f": {' | '.join(last)}" if last else "")

    def _broke(self, error: Exception) -> None:
        log.warning("a script cannot be run; the run goes on: %s", error)


def script_problems(settings: WatchConfig) -> list[Problem]:
    """Scripts whose program is not there, or may not be run."""
    problems = []
    for key in ("post_checkpoint_script", "post_upload_script"):
        command = vars(settings)[key]
        program = shlex.split(command)[0] if command else None
        if program is None or shutil.which(program):
            continue
        if Path(program).is_file():
            fix = f"chmod +x {shlex.quote(program)}, or begin the command with its interpreter, such as bash or python"
            problems.append(Problem(key, f"the program {program} may not be executed", fix))
        else:
            problems.append(Problem(key, f"the program {program} must exist and does not", "check the path"))
    return problems
