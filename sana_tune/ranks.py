"""Which of several processes this one is, as the launcher says it in the environment. No torch.

`sana_tune train` launches the others itself; `accelerate launch` and `torchrun` set the same variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sana_tune.errors import Problem, UserError

# Set by `sana_tune train` for the processes that it launches: a folder in which each says how it ended.
TOLD_IN = "SANA_TUNE_LAUNCHED_IN"


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


def told_in(environ: Mapping[str, str] | None = None) -> Path | None:
    """The folder in which a process that `sana_tune train` launched says how it ended."""
    found = (os.environ if environ is None else environ).get(TOLD_IN)
    return Path(found) if found else None
