"""Processes that share work, wait for each other and agree: threads over a store in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sana_tune.errors import OthersFailed, UserError
from sana_tune.ranks import Rank
from sana_tune.train import crew as crews
from sana_tune.train.crew import ALONE, Crew, LostRank, is_lost_connection


class Memory:
    """A store as torch's: what one sets, all see."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.kept[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.kept[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)

    def delete_key(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None


def in_all(count: int, do: Callable[[Crew], Any], store: Memory | None = None) -> list[Any]:
    """What `do` answers, or raises, in each process of a crew."""
    store, found = store or Memory(), dict[int, Any]()

    def life(rank: int) -> None:
        try:
            found[rank] = do(Crew(Rank(rank, count, rank), store))
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=life, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(count)]


def test_the_work_is_shared_without_a_rest():
    parts = in_all(3, lambda crew: crew.share(range(8)))
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert ALONE.share("abc") == ["a", "b", "c"]


def test_values_are_gathered_by_rank_and_forgotten():
    def do(crew: Crew) -> list[list[Any]]:
        time.sleep(0.01 * crew.rank.rank)
        return [crew.gather("numbers", [turn, crew.rank.rank]) for turn in range(6)]

    store = Memory()
    for found in in_all(3, do, store):
        assert found == [[[turn, rank] for rank in range(3)] for turn in range(6)]
    assert len(store.kept) == 2 * 3, "two turns are kept"
    assert ALONE.gather("nothing", 5) == [5]


def test_the_first_goes_first():
    order: list[int] = []

    def do(crew: Crew) -> None:
        if crew.is_main:
            time.sleep(0.1)
        crew.first_main("it", lambda: order.append(crew.rank.rank))

    in_all(3, do)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_all_are_told_when_one_found_something_else():
    found = in_all(3, lambda crew: crew.agree("plan", "other" if crew.rank.rank == 1 else "same"))
    assert all(isinstance(each, UserError) and "rank 1 found another plan than rank 0" in str(each) for each in found)
    assert in_all(2, lambda crew: crew.agree("plan", "same")) == [None, None]


def test_who_waits_says_for_what_and_gives_up_when_there_is_no_sign_of_life(monkeypatch, caplog):
    monkeypatch.setattr(crews, "TOLD_EVERY_S", 0.1)
    monkeypatch.setattr(crews, "SILENT_S", 0.5)
    monkeypatch.setattr(crews, "_BEAT_EVERY_S", 0.0)
    monkeypatch.setattr(crews.log, "propagate", True)
    store, slow = Memory(), 1.2

    def do(crew: Crew) -> Any:
        began_s = time.monotonic()
        while crew.rank.rank == 1 and time.monotonic() - began_s < slow:
            crew.beat(f"latents of d0, {time.monotonic() - began_s:.1f}")
            time.sleep(0.05)
        return crew.gather("the latents", crew.rank.rank)

    with caplog.at_level("INFO"):
        assert in_all(2, do, store) == [[0, 1], [0, 1]], "beats are a sign of life"
    assert "Waiting for the latents (rank 1: latents of d0, " in caplog.text
    (gone,) = in_all(1, lambda crew: Crew(Rank(0, 2), Memory()).gather("the latents"))
    assert "waiting for the latents: it showed no sign of life" in str(gone)


def test_what_torch_makes_of_a_lost_process_is_told_in_our_words():
    error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:51403")
    assert is_lost_connection(error) and not is_lost_connection(RuntimeError("shapes differ"))
    with (
        pytest.raises(LostRank, match="rank 1: the connection to another process") as lost,
        Crew(Rank(1, 2), Memory()).told_of_losses(),
    ):
        raise error
    assert isinstance(lost.value, OthersFailed)
    with pytest.raises(RuntimeError, match="shapes"), ALONE.told_of_losses():
        raise RuntimeError("shapes differ")
