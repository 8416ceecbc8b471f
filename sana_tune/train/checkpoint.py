"""Checkpoints: weights, average, optimizer state and position, written whole or not at all (contracts §8).

checkpoint-<step>/  transformer/{config.json, diffusion_pytorch_model.safetensors}  transformer_ema/ likewise
                    optimizer.pt  progress.json  manifest.json (last: its presence means complete)
Of an adapter, in place of the first two: pytorch_lora_weights.safetensors and lycoris_config.json, in ema/ likewise.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from sana_tune.errors import OthersFailed, Problem, UserError
from sana_tune.log import log
from sana_tune.plan import human_bytes
from sana_tune.progress import Every, Progress, due
from sana_tune.saving import Keeping, Stand, reasons
from sana_tune.train import folders
from sana_tune.train.folders import FRESH, Checkpoint
from sana_tune.train.judged import Judged, stands_of
from sana_tune.train.room import Lack, Room, call_script, is_full, slices
from sana_tune.train.sharding import is_sharded, put
from sana_tune.train.snapshot import Memory, Snapshot, copied, snapshot
from sana_tune.train.states import load_full_state, names_of
from sana_tune.train.step import Parts, summed
from sana_tune.train.writing import OPTIMIZER, Terms, Writing
from sana_tune.watch.background import attempt
from sana_tune.watch.events import Event, Noticed, Saved

if TYPE_CHECKING:
    from accelerate import Accelerator


HEAR_S = 0.2
THREAD = "checkpoint"  # the name of the writer's thread


class _Verdict(IntEnum):
    """What the main process says, to all processes."""

    GO = 0  # there is room; or nothing is in flight any more
    WAIT = 1
    LEAVE = 2  # the run was asked to stop meanwhile
    END = 3
    AGAIN = 4  # the disk was full: write it once more


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is being written by a thread, or was just now. began_s: when the saving began.

    fill: copies the live state into the snapshot; copied: that is done.
    """

    snapshot: Snapshot
    rolling: bool
    began_s: float
    fill: Callable[[], None] = lambda: None
    copied: threading.Event = field(default_factory=threading.Event)
    future: Future[Saved] = field(default_factory=Future)
    terms: Terms = field(default_factory=Terms)


class Checkpoints:
    """Saves to and restores from one output folder. One checkpoint at most is being written at a time.

    keeping:  which checkpoints stay; None = all.
    identity: what the run is (model, what is trained, optimizer …), plain values; a checkpoint with another
              identity is refused.
    background: whether a copy is written while training goes on; else `save` waits until it is done.
    room:     what must be free on the disk, and what to do otherwise.
    begun:    where a run stands that goes on from no checkpoint; None = at step 0.
    Every process calls the same methods in the same order; the main one alone writes. Events go to the `emit` of
    `telling`, on the thread that trains.
    """

    def __init__(
        self,
        output_dir: Path,
        keeping: Keeping | None = None,
        identity: Mapping[str, Any] | None = None,
        *,
        background: bool = False,
        room: Room | None = None,
        begun: Progress | None = None,
    ):
        self.output_dir = output_dir
        self.keeping = keeping or Keeping()
        self.identity = dict(identity or {})
        self.background = background
        self.room = room or Room()
        self.begun = begun or Progress()
        self._judged = Judged(output_dir)
        self._accelerator: Accelerator | None = None
        self._memory: Memory | None = None
        self._flight: _Flight | None = None
        self._failure: UserError | None = None
        self._held_step: int | None = None  # saved or restored last, whole
        self._asked_step: int | None = None  # the same, or still on its way
        self._left = False
        self._verified: set[tuple[Path, int]] = set()
        self._emit: Callable[[Event], None] = lambda event: None
        self._stopping: Callable[[], bool] = lambda: False

    @contextmanager
    def telling(self, emit: Callable[[Event], None], stopping: Callable[[], bool]) -> Iterator[None]:
        """In here events are told, and a wait for room ends when `stopping`.

        What is in flight at the end is waited for; where the run is left at once (a KeyboardInterrupt) it is given up.
        """
        self._emit, self._stopping = emit, stopping
        try:
            yield
            self._settle()
        except KeyboardInterrupt:
            self._abandon()
            raise
        finally:
            self._last_words()

    def restore(self, parts: Parts, checkpoint: Checkpoint | None) -> Progress:
        """Put a checkpoint's state into the parts; without one, the run starts. Leftovers of killed runs go.

        Raises UserError when the checkpoint is damaged or of another run, telling the difference.
        """
        self._accelerator = parts.accelerator
        self._settle()
        if self._is_main:
            folders.clean(self.output_dir)
            if checkpoint is not None:
                folders.verify(checkpoint)
        parts.accelerator.wait_for_everyone()
        if checkpoint is None:
            return self.begun
        folders.check_identity(checkpoint, self.identity)
        _load_weights(checkpoint.path / checkpoint.layout.weights, parts.kept())
        _load_ema(parts, checkpoint)
        _load_optimizer(parts, checkpoint)
        progress = checkpoint.progress()
        self._held_step = self._asked_step = progress.step
        self._verified.add((checkpoint.path, checkpoint.serial))
        if self._is_main:
            self._judged.forget_after(progress.step)
        return progress

    def save(self, parts: Parts, progress: Progress, *, rolling: bool = False) -> None:
        """Write checkpoint-<step>; in the background it is copied too, while the next step computes, and `parts.fence`
        keeps weights and states from moving until that is done. Waits for one before it, and for room.

        Raises UserError when the disk does not take it, or did not take the one before.
        """
        self._accelerator = parts.accelerator
        self._settle()
        began_s = time.perf_counter()
        flight = _Flight(snapshot(parts, progress), rolling, began_s)
        self._asked_step = progress.step
        if self.background and self._is_main:
            shares = parts.accelerator.device.type == "cpu"  # a GPU's training leaves the cores to the writer
            flight = replace(flight, terms=Terms(rests=shares))
        if is_sharded(parts.bare):
            flight.copied.set()  # what was gathered is a copy already
        elif self.background and self._is_main:
            self._memory = self._memory or Memory(pinned=parts.accelerator.device.type == "cuda")
            taken, fill = copied(flight.snapshot, self._memory)
            flight = replace(flight, snapshot=taken, fill=fill)
        self._begin(flight)
        if self._flight is not None:
            parts.fence.raise_until(flight.copied)
        if not self.background:
            self._settle()

    def save_due(
        self, every: Every, parts: Parts, progress: Progress, epoch_after: Callable[[int], float] | None = None
    ) -> None:
        """Save where a checkpoint is due right after `progress`, an ordinary or a rolling one (`due`)."""
        if due(every, progress, epoch_after):
            self.save(parts, progress)
        elif due(Every(self.keeping.rolling_every), progress):
            self.save(parts, progress, rolling=True)

    def poll(self) -> None:
        """To be called now and then: tells of a checkpoint that is complete, and sees to one that failed."""
        if self._flight is None or not self._flight.future.done():
            return
        if self._alone:
            self._settle()
        elif self._flight.future.exception() is None:
            self._landed()  # what failed is seen to at the next save, to which all processes come

    def finish(self, parts: Parts, progress: Progress) -> bool:
        """Save what is not saved yet and wait until it is complete. Whether it is: a stop ends the wait for room."""
        if progress.step and progress.step != self._asked_step:
            self.save(parts, progress)
        self._settle()
        return not self._left

    def held(self) -> Checkpoint | None:
        """The checkpoint that this run saved or restored last, complete; None before the first."""
        self._settle()
        return None if self._held_step is None else folders.read(self.output_dir / folders.folder_name(self._held_step))

    def judge(self, progress: Progress, loss: float) -> None:
        """Note the held-out loss of the weights at a step: checkpoints_keep_best goes by it."""
        if self._is_main:
            self._judged.add(progress.step, loss)

    # ---- one write: begun, waited for, told ----

    @property
    def _is_main(self) -> bool:
        return self._accelerator is None or self._accelerator.is_main_process

    @property
    def _alone(self) -> bool:
        return self._accelerator is None or self._accelerator.num_processes == 1

    def _agreed(self, verdict: _Verdict) -> _Verdict:
        """The main process's verdict, in all of them; where any is to stop, nobody waits any longer."""
        stopping = float(self._stopping())
        if self._accelerator is not None and not self._alone:
            said = torch.tensor([float(verdict if self._is_main else 0), stopping], device=self._accelerator.device)
            number, stopping = summed(self._accelerator, said).tolist()
            verdict = _Verdict(int(number))
        return _Verdict.LEAVE if verdict == _Verdict.WAIT and stopping else verdict

    def _begin(self, flight: _Flight, failed: bool = False) -> None:
        """Have it written as soon as there is room; not at all when the run is to stop meanwhile."""
        if self._await_room(flight, failed) and self._is_main:
            # Known before it starts: a signal may come while the thread starts, and what is in flight is given up then.
            self._flight = flight = replace(flight, future=Future())
            threading.Thread(target=self._fly, args=(flight,), name=THREAD).start()

    def _fly(self, flight: _Flight) -> None:
        """Write it, in a thread of its own; what became of it is told by its future."""
        if not flight.future.set_running_or_notify_cancel():
            return
        saved: list[Saved] = []
        error = attempt(lambda: saved.append(self._write(flight)))
        if error is None:
            flight.future.set_result(saved[0])
        else:
            flight.future.set_exception(error)

    def _settle(self) -> None:
        """Wait for the write in flight and tell of it; one that found the disk full is done again when there is room.

        Raises UserError when it failed otherwise.
        """
        while (verdict := self._agreed(self._landed())) == _Verdict.AGAIN:
            flight, self._flight = self._flight, None
            if flight is None:  # another process than the main one
                flight = _Flight(Snapshot(Progress(), {}, {}, {}, {}), False, 0.0)
            self._begin(flight, failed=True)
        if verdict == _Verdict.END:
            raise self._failure or OthersFailed(
                Problem(str(self.output_dir), "the main process could not save", _ABOVE)
            )

    def _landed(self) -> _Verdict:
        """What became of the write in flight, once it is over."""
        flight = self._flight
        if flight is None:
            return _Verdict.GO
        self._wait(flight)
        error = flight.future.exception()
        if is_full(error):
            return _Verdict.AGAIN
        self._flight = None
        progress = flight.snapshot.progress
        if error is None:
            self._held_step = progress.step
            self._emit(flight.future.result())
            return _Verdict.GO
        if not isinstance(error, OSError):
            raise error
        fix = "check the disk; started again, the run goes on from its newest checkpoint"
        path = self.output_dir / folders.folder_name(progress.step)
        return self._failing(Problem(str(path), f"the checkpoint could not be written: {error}", fix), error)

    def _failing(self, problem: Problem, cause: BaseException | None = None) -> _Verdict:
        """The run is to end with this problem."""
        self._failure = UserError(problem)
        self._failure.__cause__ = cause
        return _Verdict.END

    def _wait(self, flight: _Flight) -> None:
        flight.terms.hurry.set()
        try:
            while not flight.future.done():  # a signal that another thread received is heard between two waits
                wait([flight.future], HEAR_S)
        except KeyboardInterrupt:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Give up the write in flight; its thread removes what it wrote."""
        if self._flight is not None:
            self._flight.terms.abandoned.set()
            self._flight.terms.hurry.set()
            if not self._flight.future.cancel():  # it is, where its thread had not come to it yet
                wait([self._flight.future])
            self._flight = None

    def _last_words(self) -> None:
        """Where the run ends with an error: what it wrote last is finished, and nothing hides the error."""
        flight = self._flight
        if flight is not None and self._landed() != _Verdict.GO:
            step, error = flight.snapshot.progress.step, flight.future.exception()
            log.error("checkpoint-%d could not be written: %s", step, error)
        self._flight = None

    # ---- room on the disk ----

    def _await_room(self, flight: _Flight, failed: bool = False) -> bool:
        """Wait until the disk has room, and say so; False when the run is to stop meanwhile. failed: it was full just
        now, whatever it tells of free space. Raises UserError where the run is to end instead."""
        pause = _Pause()
        while (verdict := self._agreed(self._room_verdict(flight, failed, pause))) == _Verdict.WAIT:
            failed = False
            for _ in slices(pause.wait_s):
                if self._stopping():
                    break
        progress = flight.snapshot.progress
        if verdict == _Verdict.END:
            raise self._failure or OthersFailed(Problem(str(self.output_dir), "the disk is too full", _ABOVE))
        if verdict == _Verdict.LEAVE:
            held = (
                "there is no checkpoint yet" if self._held_step is None else f"the newest is of step {self._held_step}"
            )
            self._emit(Noticed(progress, f"Left without checkpoint-{progress.step}: {held}, and the run goes on there"))
            self._left = True
        elif pause.told_s is not None:
            self._emit(Noticed(progress, f"There is room again: checkpoint-{progress.step} is written", "info"))
        return verdict == _Verdict.GO

    def _room_verdict(self, flight: _Flight, failed: bool, pause: _Pause) -> _Verdict:
        """What the main process makes of the disk."""
        if not self._is_main:
            return _Verdict.GO  # counts as 0 in the sum
        step, size = flight.snapshot.progress.step, flight.snapshot.size_bytes
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            lack = self.room.lack(self.output_dir, size + size // 100, self._freed_bytes(flight))
        except OSError as error:
            what = f"checkpoint-{step} cannot be written there: {error}"
            return self._failing(Problem(str(self.output_dir), what, "bring the folder back and start again"), error)
        pause.wait_s = self.room.look_s
        if lack is None and failed:
            lack, pause.wait_s = (
                Lack(0, size, "the disk took no more, whatever it tells of free space"),
                self.room.retry_s,
            )
        if lack is None:
            return _Verdict.GO
        free, needed = human_bytes(lack.free_bytes), human_bytes(lack.needed_bytes)
        what = f"{free} are free, and checkpoint-{step} needs {needed} ({lack.why})"
        if self.room.action == "stop":
            fix = "make room; started again, the run goes on from its newest checkpoint (disk_low_action wait waits)"
            return self._failing(Problem(str(self.output_dir), what, fix))
        if pause.is_due(self.room.tell_s):
            message = f"{self.output_dir}: {what}: training waits until there is room. Ctrl-C leaves without saving"
            self._emit(Noticed(flight.snapshot.progress, message))
        if self.room.action == "script" and self.room.script and not pause.called:
            pause.called = True
            failure = call_script(self.room.script, self.output_dir, lack, self._stopping)
            if failure:
                self._emit(Noticed(flight.snapshot.progress, f"disk_low_script {self.room.script}: {failure}"))
        return _Verdict.WAIT

    def _freed_bytes(self, flight: _Flight) -> int:
        """What goes before it is written; about, since nothing is read to see whether the newest is whole."""
        complete = folders.list_complete(self.output_dir)
        return sum(each.size_bytes for each in self._surplus(complete, flight) if each.path != complete[-1].path)

    # ---- in the thread that writes ----

    def _write(self, flight: _Flight) -> Saved:
        """Copy, prune, write aside, give it its name, prune. Raises OSError; Abandoned when it is wanted no more."""
        try:
            if not flight.copied.is_set():  # once: it may have failed later, and training gone on
                flight.fill()
        finally:
            flight.copied.set()
        step = flight.snapshot.progress.step
        path = self.output_dir / folders.folder_name(step)
        removed = self._prune(flight)
        staged = folders.aside(self.output_dir, step, "tmp")
        staged.mkdir()
        try:
            serial = 1 + max((each.serial for each in folders.list_complete(self.output_dir)), default=0)
            manifest = {"step": step, "serial": serial, **({"rolling": True} if flight.rolling else {})}
            Writing(staged, flight.terms).all_of(flight.snapshot, self.identity, manifest)
            folders.publish(staged, path, step)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self._verified.add((path, serial))
        removed += self._prune(None)
        return Saved(flight.snapshot.progress, str(path), time.perf_counter() - flight.began_s, tuple(removed))

    def _prune(self, flight: _Flight | None) -> list[str]:
        """Remove what need not stay beside the checkpoint in flight, but never the newest verified one."""
        complete = folders.list_complete(self.output_dir)
        surplus = self._surplus(complete, flight)
        if not surplus:
            return []
        keep = self._newest_verified(complete)
        gone = [each for each in surplus if keep is None or each.path != keep.path]
        for each in gone:
            folders.remove(each)
        return [str(each.path) for each in gone]

    def _surplus(self, complete: Sequence[Checkpoint], flight: _Flight | None) -> list[Checkpoint]:
        """The checkpoints that no rule keeps, once the one in flight is there; one that it replaces is none of them."""
        replaced = None if flight is None else flight.snapshot.progress.step
        there = [each for each in complete if each.step != replaced]
        stands = stands_of(there, self._judged.losses)
        if flight is not None:
            stands.append(Stand(flight.snapshot.progress.step, flight.rolling))
        return [each for each, why in zip(there, reasons(stands, self.keeping), strict=False) if not why]

    def _newest_verified(self, complete: Sequence[Checkpoint]) -> Checkpoint | None:
        """What this process wrote or verified counts; an older one is read once."""
        for each in reversed(complete):
            if (each.path, each.serial) in self._verified or not folders.damage(each):
                self._verified.add((each.path, each.serial))
                return each
        return None


_ABOVE = "the main process tells more"


@dataclass
class _Pause:
    """What was said and done while there is no room."""

    told_s: float | None = None
    called: bool = False
    wait_s: float = 1.0

    def is_due(self, tell_s: float) -> bool:
        """Whether it is to be said, for the first time or again."""
        now = time.monotonic()
        if self.told_s is not None and now < self.told_s + tell_s:
            return False
        self.told_s = now
        return True


@torch.no_grad()
def _load_weights(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into `targets`, one by one. Raises UserError if names, shapes or dtypes differ."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(targets):
            odd = sorted(names ^ set(targets))
            what = f"it holds another model: {len(odd)} tensors are on one side only, such as {odd[0]}"
            raise UserError(Problem(str(path), what, FRESH))
        for name, target in targets.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape or tensor.dtype != target.dtype:
                found, wanted = _describe(tensor), _describe(target)
                raise UserError(Problem(str(path), f"{name} is {found}, this run's is {wanted}", FRESH))
            put(target, tensor)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _load_ema(parts: Parts, checkpoint: Checkpoint) -> None:
    wanted, path = parts.kept_average(), checkpoint.path / checkpoint.layout.average
    if wanted and path.exists():
        _load_weights(path, wanted)
    elif wanted:
        parts.ema.reset()
        log.warning("%s has no EMA; it starts from the weights of step %d", checkpoint.path, checkpoint.step)
    elif path.exists():
        log.warning("%s has an EMA, but use_ema is off: it is not carried on", checkpoint.path)


def _load_optimizer(parts: Parts, checkpoint: Checkpoint) -> None:
    path = checkpoint.path / OPTIMIZER
    # On a CPU the tensors are taken over; elsewhere each process reads what it puts on its device, no more.
    mapped = parts.accelerator.device.type != "cpu"
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    try:
        load_full_state(parts.optimizer, names_of(parts.bare.named_parameters()), state)
    except (ValueError, KeyError) as error:
        raise UserError(Problem(str(path), f"it is of another optimizer: {error}", FRESH)) from error
