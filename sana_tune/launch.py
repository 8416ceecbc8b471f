"""`train` in several processes: launched by Accelerate, watched over, and ended together.

This process first tells every mistake that can be told without torch. Then Accelerate's launcher, in a thread, starts
the processes and ends all of them when one fails. Signals are handed on to them: they save, agree and leave, and this
process ends with what they say.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from sana_tune import log as logs
from sana_tune.config.launching import read_accelerate, split
from sana_tune.config.load import Loaded
from sana_tune.errors import Interrupted, Problem, UserError
from sana_tune.log import log
from sana_tune.output import Output
from sana_tune.prepare import finished_already, no_room, prepare
from sana_tune.ranks import LAUNCHER, TOLD_IN, Ending, Repeats, endings, own_rank

GRACE_S = 10.0  # for the others when one process is gone, before they are killed
AT_ONCE_S = 5.0  # when a second signal asked to leave at once
_LOOKING_EVERY_S = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_wanted(loaded: Loaded) -> bool:
    """Whether several processes are to be launched: they are asked for, and this is not one of them."""
    return loaded.config.launch.processes > 1 and own_rank() is None


def launch(loaded: Loaded, words: Sequence[str], *, notes: Sequence[str] = (), restart: bool = False) -> None:
    """Run in several processes and wait for their end. words: of the command line, from `train` on.

    Raises UserError with what went wrong in any of them, Interrupted when a signal ended it.
    """
    logs.setup()
    logs.quiet_libraries()
    crowd = Crowd()
    with crowd.listening():
        try:
            if not _is_worth_it(loaded, notes, restart):
                return
        except KeyboardInterrupt:
            raise Interrupted(crowd.asked[0]) from None
        wanted = loaded.config.launch
        where = "" if (wanted.num_machines or 1) == 1 else f" on {wanted.num_machines} machines"
        log.info("Launching %d processes%s", wanted.processes, where)
        crowd.run(loaded, words)
    crowd.conclude()


def _is_worth_it(loaded: Loaded, notes: Sequence[str], restart: bool) -> bool:
    """Whether there is anything to do. UserError for what can be known to be wrong; warnings are the run's to tell."""
    handlers = [handler for handler in log.handlers if isinstance(handler, logs.ConsoleHandler)]
    for handler in handlers:
        handler.addFilter(_is_progress)
    try:
        output = Output.open(Path(loaded.config.train.output_dir))
        prepared = prepare(loaded, output, notes, fresh=restart)
        if (problem := no_room(output, prepared.plan)) is not None:
            raise UserError(problem)
        return finished_already(prepared) is None
    finally:
        for handler in handlers:
            handler.removeFilter(_is_progress)


def _is_progress(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING


@dataclass
class Crowd:
    """The processes that are launched from here. asked: the signals that were heard, in order."""

    asked: list[int] = field(default_factory=list)
    _folder: Path = field(default_factory=Path)
    _endings: list[Ending] = field(default_factory=list)
    _error: BaseException | None = None
    _is_launched: bool = False
    _repeats: Repeats = field(default_factory=Repeats)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals in here. Before anything is launched one of them ends this process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._repeats.has(number):
            return
        self.asked.append(number)
        if not self._is_launched:
            raise KeyboardInterrupt

    def run(self, loaded: Loaded, words: Sequence[str]) -> None:
        """Launch the processes and stay until the last of them has ended."""
        self._folder = Path(tempfile.mkdtemp(prefix="sana_tune-ranks-"))
        self._is_launched = True
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="launcher") as thread:
                launched = thread.submit(self._accelerate, loaded, words)
                self._watch(launched)
            self._error = launched.exception()
            if self._error is not None:
                log.debug("the launcher failed", exc_info=self._error)
            self._endings = [ending for _, ending in endings(self._folder)]
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _accelerate(self, loaded: Loaded, words: Sequence[str]) -> None:
        """Have Accelerate launch the processes. What it and torch say of failures is not for the user."""
        from accelerate.commands.launch import launch_command, launch_command_parser

        for name in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(GRACE_S)))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ[TOLD_IN], os.environ[LAUNCHER] = str(self._folder), str(os.getpid())
        said = StringIO()
        try:
            with redirect_stderr(said):
                asked = launch_command_parser().parse_args(launcher_words(loaded, self._folder, words))
            launch_command(asked)
        except SystemExit:  # of the parser, which has said why
            reason = said.getvalue().strip().rpartition("error: ")[2]
            fix = "`accelerate launch --help` lists the words that it takes"
            raise UserError(Problem("accelerate_extra_args", f"accelerate says: {reason}", fix)) from None
        finally:
            for name in (TOLD_IN, LAUNCHER):
                os.environ.pop(name, None)

    def _watch(self, launched: Future[None]) -> None:
        """Hand signals on, and end those that hang when one of them is gone."""
        own, handed = psutil.Process(), dict[int, int]()  # process → how many signals it was sent
        kill_at_s: float | None = None
        while not launched.done():
            wait([launched], _LOOKING_EVERY_S)
            here = ranks_among(own.children())
            now, asked = time.monotonic(), list(self.asked)
            for pid in here:
                # one that began after a signal does not listen yet: it is to end, without a traceback
                numbers = asked[handed[pid] :] if pid in handed else [signal.SIGTERM] * bool(asked)
                for number in numbers:
                    _send(pid, number)
                handed[pid] = len(asked)
            if kill_at_s is None and (len(asked) > 1 or self._is_one_gone(handed.keys() - here)):
                kill_at_s = now + (AT_ONCE_S if len(asked) > 1 else GRACE_S)
            if len(asked) > 2 or (kill_at_s is not None and now > kill_at_s):
                for pid in here:
                    _send(pid, signal.SIGKILL)

    def _is_one_gone(self, gone: set[int]) -> bool:
        """Whether any of these processes has ended otherwise than well."""
        ended = dict(endings(self._folder)) if gone else {}
        return any(pid not in ended or ended[pid].code for pid in gone)

    def conclude(self) -> None:
        """Say how it ended: nothing when all went well."""
        problems = list(self._error.problems) if isinstance(self._error, UserError) else []
        told = [ending for ending in self._endings if ending.problems and not ending.lost]
        problems += self._problems(told)
        if not problems and self.asked:
            raise Interrupted(self.asked[0])
        if not problems:
            problems = self._deaths() or self._problems([ending for ending in self._endings if ending.lost])
        if problems:
            raise UserError(*dict.fromkeys(problems))
        codes = [ending.code for ending in self._endings if ending.code]
        if codes:  # one of them was sent a signal by somebody else, and all have saved
            raise Interrupted(codes[0] - 128)

    @staticmethod
    def _problems(told: Sequence[Ending]) -> list[Problem]:
        """What the processes have said, the same once; what others than the first say alone names them."""
        found: list[Problem] = []
        for ending in told:
            for problem in ending.problems:
                if problem not in found:
                    where = f"rank {ending.rank}: {problem.where}" if ending.rank and found else problem.where
                    found.append(Problem(where, problem.what, problem.fix))
        return found

    def _deaths(self) -> list[Problem]:
        """What can be said of processes that ended without a word."""
        again = "started again, the run goes on from its newest checkpoint"
        if self._error is None:
            return []
        failures: dict[int, Any] = vars(self._error).get("failures", {})
        if not failures:
            what = f"{type(self._error).__name__}: {str(self._error).strip()}"
            return [Problem("launching the processes", what, "see accelerate_config and accelerate_extra_args")]
        spoken = {ending.rank for ending in self._endings}
        silent = {rank: each for rank, each in failures.items() if rank not in spoken}
        if not silent and any(ending.lost for ending in self._endings):
            return []  # nobody died: what they saw of each other is all there is to tell
        silent = silent or failures
        # one that the launcher ended for another's sake is no cause
        causes = {rank: each for rank, each in silent.items() if each.exitcode != -signal.SIGTERM} or silent
        rank, cause = min(causes.items())
        return [_death(rank, cause.pid, cause.exitcode, again)]


def ranks_among(children: Sequence[psutil.Process]) -> set[int]:
    """The ids of those that live and are of the run: the launcher asks other programs too, such as nvidia-smi."""
    found = set[int]()
    for child in children:
        try:
            if child.status() != psutil.STATUS_ZOMBIE and own_rank(child.environ()) is not None:
                found.add(child.pid)
        except (psutil.Error, UserError):
            pass  # it has just ended, or is no process of ours
    return found


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended


def _death(rank: int, pid: int, code: int, again: str) -> Problem:
    if code >= 0:
        return Problem(f"rank {rank}", f"it failed (process {pid}, exit code {code}); why is said above", again)
    name = signal.Signals(-code).name
    what = f"it was killed by {name} (process {pid}), and the others were ended"
    why = "the system kills so what takes too much memory (see `dmesg`); " if name == "SIGKILL" else ""
    return Problem(f"rank {rank}", what, f"{why}{again}")


def launcher_words(loaded: Loaded, folder: Path, words: Sequence[str]) -> list[str]:
    """The words for `accelerate launch`. What it is to do stands in a config file of its own, written to `folder`."""
    wanted = loaded.config.launch
    content: dict[str, Any] = {}
    if wanted.accelerate_config:
        content = dict(read_accelerate(Path(wanted.accelerate_config).expanduser()))
    machines = wanted.num_machines or 1
    kind = str(content.get("distributed_type", "")).upper()
    content |= {
        "compute_environment": "LOCAL_MACHINE",
        # with MULTI_CPU accelerate would start one process; the run connects over the CPU where that is its device
        "distributed_type": kind if kind == "FSDP" else "MULTI_GPU",
        "use_cpu": False,
        "mixed_precision": "no",  # the run itself says how it computes
        "dynamo_config": {},
        "num_processes": wanted.processes,
        "num_machines": machines,
        "machine_rank": wanted.machine_rank or 0,
        "main_process_ip": wanted.main_process_ip,
        "main_process_port": wanted.main_process_port or (0 if machines == 1 else None),
    }
    file = folder / "launch.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    extra = split(wanted.accelerate_extra_args or "")
    return ["--config_file", str(file), "--log_dir", str(folder), *extra, "-m", "sana_tune", *words]
