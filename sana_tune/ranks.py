"""Which of several processes this one is, as the launcher says it in the environment. No torch.

`sana_tune train` launches the others itself; `accelerate launch` and `torchrun` set the same variables.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sana_tune.errors import Problem, UserError

# Set by `sana_tune train` for the processes that it launches: a folder in which each says how it ended, and by whom it
# was launched.
TOLD_IN = "SANA_TUNE_LAUNCHED_IN"
LAUNCHER = "SANA_TUNE_LAUNCHER_PID"
REPEATED_S = 3.0
_LOOKING_EVERY_S = 0.5


@dataclass(frozen=True)
class Rank:
    """Number `rank` of `ranks` processes, and number `local` of those on this machine."""

    rank: int = 0
    ranks: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def own_rank(environ: Mapping[str, str] | None = None) -> Rank | None:
    """This process among those that a launcher started; None where none did. UserError for numbers that are none.

    RANK and WORLD_SIZE alone are no sign: some schedulers set them for machines.
    """
    environ = os.environ if environ is None else environ
    given = {name: environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(given.values()):
        return None
    try:
        rank, ranks, local = (int(text) for text in given.values())
    except ValueError:
        rank = ranks = local = -1
    if not 0 <= local <= rank < ranks:
        found = ", ".join(f"{name}={text}" for name, text in given.items())
        what = f"a launcher must set numbers with LOCAL_RANK ≤ RANK < WORLD_SIZE; found {found}"
        raise UserError(Problem("environment", what, "unset them, or start the run with `sana_tune train`"))
    return Rank(rank, ranks, local)


class Repeats:
    """Tells signals that are no second wish to stop.

    A scheduler may send SIGTERM to every process of a job (Slurm, systemd), and a launcher hands on what it was sent.
    What another process of a run was asked arrives here too. A second Ctrl-C is a second wish.
    """

    def __init__(self) -> None:
        self._until_s: dict[int, float] = {}

    def expect(self, number: int) -> None:
        """Another process was sent this signal: that of this one may be on its way."""
        self._until_s[number] = time.monotonic() + REPEATED_S

    def has(self, number: int) -> bool:
        """Whether this signal, which was heard just now, is such a one."""
        is_one = time.monotonic() < self._until_s.get(number, 0.0)
        if number != signal.SIGTERM:
            self._until_s.pop(number, None)
        elif not is_one:
            self.expect(number)
        return is_one


@dataclass(frozen=True)
class Ending:
    """How a process ended that `sana_tune train` launched.

    code: as the command would have ended with it. problems: what it would have said. lost: it only lost the others.
    """

    rank: int
    code: int
    problems: tuple[Problem, ...] = ()
    lost: bool = False

    def write(self, folder: Path) -> None:
        """Tell the launcher. What is written is there whole or not at all."""
        aside = folder / f".{os.getpid()}"
        aside.write_text(json.dumps(asdict(self)), encoding="utf-8")
        aside.rename(folder / f"{os.getpid()}.json")

    @classmethod
    def read(cls, path: Path) -> Ending:
        """What `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "problems": tuple(Problem(**problem) for problem in content["problems"])})


def wants_shards(environ: Mapping[str, str] | None = None) -> bool:
    """Whether accelerate's launcher said that the model is to be split over the processes (its file, or --use_fsdp)."""
    return (os.environ if environ is None else environ).get("ACCELERATE_USE_FSDP", "").lower() == "true"


def told_in(environ: Mapping[str, str] | None = None) -> Path | None:
    """The folder in which a process that `sana_tune train` launched says how it ended."""
    found = (os.environ if environ is None else environ).get(TOLD_IN)
    return Path(found) if found else None


def live_with_launcher() -> None:
    """Have this process asked to stop when its launcher dies, so that nobody is left behind.

    A thread looks. Linux can send a signal by itself, but sends one for each thread of the launcher that dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run listens: no traceback
    if launcher := os.environ.get(LAUNCHER):
        threading.Thread(target=_stop_without, args=(int(launcher),), name="launcher", daemon=True).start()


def _stop_without(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOKING_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


def endings(folder: Path) -> Sequence[tuple[int, Ending]]:
    """Process id and ending of the processes that have ended by themselves, by rank."""
    found = [(int(path.stem), Ending.read(path)) for path in folder.glob("*.json")]
    return sorted(found, key=lambda each: each[1].rank)
