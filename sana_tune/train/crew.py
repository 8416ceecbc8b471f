"""The processes of a run among each other: shares of the work, waiting, agreeing.

Nothing here is a collective operation of the device. Values go through the store by which the processes found each
other, and who waits looks there from time to time: nobody runs into the time limit of a collective while another one
encodes or draws for an hour, and a signal is heard while waiting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from sana_tune.errors import OthersFailed, Problem, UserError
from sana_tune.log import log
from sana_tune.ranks import Rank
from sana_tune.train.pulse import Pulse

Value = TypeVar("Value")

TOLD_EVERY_S = 20.0
SILENT_S = 5400.0  # a process that shows no sign of life for so long is given up
_BEAT_EVERY_S = 1.0
_LOOKING_EVERY_S = (0.002, 0.2)  # at first, and in the long run


class Store(Protocol):
    """What is needed of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...


class LostRank(OthersFailed):
    """Another process of the run is gone."""


class Crew:
    """The processes of a run, seen from one of them. store: None where there is no other. pulse: tells who lives.

    All of them call `gather`, `first_main` and `agree` in the same order.
    """

    def __init__(self, rank: Rank | None = None, store: Store | None = None, pulse: Pulse | None = None):
        self.rank = rank or Rank()
        self._store = store
        self._pulse = pulse
        self._turn = 0
        self._beats = 0
        self._beaten_s = 0.0

    @classmethod
    def connected(cls, rank: Rank | None) -> Crew:
        """The crew of a process whose Accelerator is made, so that it is connected to the others."""
        if rank is None or rank.ranks == 1:
            return cls()
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = PrefixStore("sana_tune", _get_default_store())
        return cls(rank, store, Pulse(rank.rank, store))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank.is_main

    @property
    def ranks(self) -> int:
        return self.rank.ranks

    def share(self, items: Iterable[Value]) -> list[Value]:
        """The items of this process: each of the crew has every so-manieth, and all together have all."""
        return list(items)[self.rank.rank :: self.rank.ranks]

    def beat(self, doing: str) -> None:
        """A sign of life, and what this process is at, for those that wait for it."""
        now = time.monotonic()
        if self._store is None or now - self._beaten_s < _BEAT_EVERY_S:
            return
        self._beaten_s, self._beats = now, self._beats + 1
        self._store.set(f"beat/{self.rank.rank}", f"{self._beats} {doing}")

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """The plain values that all processes give, by rank; waits for the slowest of them.

        what: what is waited for, in words. Raises LostRank when one of them is gone, UserError when one that lives
        shows no sign of work any more.
        """
        if self._store is None:
            return [value]
        self._turn += 1
        with self.told_of_losses():
            self._store.set(self._key(self._turn, self.rank.rank), json.dumps(value))
            self._await(what, [self._key(self._turn, rank) for rank in range(self.ranks)])
            found = [json.loads(self._store.get(self._key(self._turn, rank))) for rank in range(self.ranks)]
            if self._turn > 2:  # who is here has read those of two turns ago
                self._store.delete_key(self._key(self._turn - 2, self.rank.rank))
        return found

    def first_main(self, what: str, do: Callable[[], Value]) -> Value:
        """Do something in the main process, and when that is through in the others."""
        if not self.is_main:
            self.gather(what)
            return do()
        done = do()
        self.gather(what)
        return done

    def agree(self, what: str, mark: str) -> None:
        """Raise UserError, in all processes, unless all found the same. mark: a short text that tells results apart."""
        marks = self.gather(what, mark)
        if len(set(marks)) > 1:
            odd = ", ".join(str(rank) for rank, each in enumerate(marks) if each != marks[0])
            told = f"all processes must find the same; rank {odd} found another {what} than rank 0"
            fix = "see that all of them read the same files and settings, and that nobody changes these meanwhile"
            raise UserError(Problem(what, told, fix))

    @contextmanager
    def told_of_losses(self) -> Iterator[None]:
        """What torch makes of a process that is gone becomes LostRank in here."""
        try:
            yield
        except RuntimeError as error:
            if self.ranks == 1 or not is_lost_connection(error):
                raise
            log.debug("the connection was lost", exc_info=error)
            said = str(error).strip().partition("\n")[0]
            raise self._lost(f"it has ended, or its machine cannot be reached ({said})") from error

    def _lost(self, how: str) -> LostRank:
        what = f"the connection to another process of the run is lost: {how}"
        fix = "see what the other one said; started again, the run goes on from its newest checkpoint"
        return LostRank(Problem(f"rank {self.rank.rank}", what, fix))

    def close(self) -> None:
        """Part from the others once all are through."""
        if self._store is None:
            return
        import torch

        try:
            with self.told_of_losses():
                self.gather("the end")
                if self.is_main:  # it may hold the store, so it leaves last
                    self._await("the end", [f"left/{rank}" for rank in range(1, self.ranks)])
                else:
                    self._store.set(f"left/{self.rank.rank}", "")
                torch.distributed.destroy_process_group()
        except LostRank as lost:  # all is saved: there is nobody to wait for
            log.debug("the others are gone", exc_info=lost)
        self.leave()

    def leave(self) -> None:
        """Wait for nobody any more, and give no sign of life."""
        if self._pulse is not None:
            self._pulse.end()
        self._store = self._pulse = None

    @staticmethod
    def _key(turn: int, rank: int) -> str:
        return f"turn/{turn}/{rank}"

    def _await(self, what: str, keys: Sequence[str]) -> None:
        """Wait until all keys are there; the last part of a key is its rank."""
        assert self._store is not None
        began_s = told_s = time.monotonic()
        signs: dict[str, tuple[str, float]] = dict.fromkeys(keys, ("", began_s))
        pause_s = _LOOKING_EVERY_S[0]
        while waiting := [key for key in signs if not self._store.check([key])]:
            now = time.monotonic()
            for key in waiting:
                sign = self._sign_of(key.rpartition("/")[2])
                signs[key] = signs[key] if sign == signs[key][0] else (sign, now)
            self._check_alive(waiting)
            silent_s = now - min(signs[key][1] for key in waiting)
            doing = "; ".join(f"rank {key.rpartition('/')[2]}: {signs[key][0].partition(' ')[2]}" for key in waiting)
            if silent_s > SILENT_S:
                told = f"it showed no sign of life for {silent_s / 60:.0f} min ({doing})"
                raise UserError(Problem(f"waiting for {what}", told, "see its log in output_dir, then start again"))
            if now - told_s > TOLD_EVERY_S:
                told_s = now
                log.info("Waiting for %s (%s)", what, doing.removesuffix(": "))
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LOOKING_EVERY_S[1])
            signs = {key: signs[key] for key in waiting}

    def _check_alive(self, keys: Sequence[str]) -> None:
        """Raise LostRank when one whose key is waited for is gone."""
        if self._store is None or self._pulse is None:
            return
        for key in keys:
            how = self._pulse.death(int(key.rpartition("/")[2]))
            if how is not None and not self._store.check([key]):  # it may have set it last of all
                raise self._lost(how)

    def _sign_of(self, rank: str) -> str:
        assert self._store is not None
        return self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""


ALONE = Crew()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error is what torch makes of a process that is gone."""
    import torch

    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    return isinstance(error, kinds) or any(name in str(error) for name in ("gloo", "NCCL", "Connection closed by peer"))
