"""Checkpoints: weights, average, optimizer state and position, written whole or not at all (contracts §8).

checkpoint-<step>/  transformer/{config.json, diffusion_pytorch_model.safetensors}  transformer_ema/ likewise
                    optimizer.pt  progress.json  manifest.json (last: its presence means complete)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.store import sync_folder
from sana_tune.train import folders
from sana_tune.train.folders import FRESH, Checkpoint
from sana_tune.train.optim import load_optimizer_state
from sana_tune.train.sharding import gathered, is_sharded, put
from sana_tune.train.step import Parts
from sana_tune.watch.events import Saved

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class State:
    """What of the parts is written, every tensor whole."""

    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, parts: Parts) -> State:
        """Collective where the tensors are split over processes; elsewhere they are the parts' own, not copies."""
        states = (parts.bare.state_dict(), parts.ema.state_dict(), parts.optimizer.state_dict())
        return cls(*(gathered(state) for state in states))


class Checkpoints:
    """Saves to and restores from one output folder.

    limit:    checkpoints kept, 0 = all. While one is written there may be one more.
    identity: what the run is (model, what is trained, optimizer …), plain values; a checkpoint with another
              identity is refused.
    """

    def __init__(self, output_dir: Path, limit: int = 0, identity: Mapping[str, Any] | None = None):
        self.output_dir = output_dir
        self.limit = limit
        self.identity = dict(identity or {})
        self._held_step: int | None = None
        self._verified: set[tuple[Path, int]] = set()

    def restore(self, parts: Parts, checkpoint: Checkpoint | None) -> Progress:
        """Put a checkpoint's state into the parts; without one, the run starts. Leftovers of killed runs go.

        Raises UserError when the checkpoint is damaged or of another run, telling the difference.
        """
        if parts.accelerator.is_main_process:
            folders.clean(self.output_dir)
            if checkpoint is not None:
                folders.verify(checkpoint)
        parts.accelerator.wait_for_everyone()
        if checkpoint is None:
            return Progress()
        folders.check_identity(checkpoint, self.identity)
        _load_weights(checkpoint.path / "transformer" / WEIGHTS, parts.bare.state_dict())
        _load_ema(parts, checkpoint)
        _load_optimizer(parts, checkpoint)
        progress = checkpoint.progress()
        self._held_step = progress.step
        self._verified.add((checkpoint.path, checkpoint.serial))
        return progress

    def save(self, parts: Parts, progress: Progress) -> Saved:
        """Write checkpoint-<step>, and keep to the limit. Raises UserError when the disk does not take it."""
        started = time.perf_counter()
        path = self.output_dir / folders.folder_name(progress.step)
        removed: list[str] = []
        state = State.of(parts) if is_sharded(parts.bare) else None  # all processes gather what is split
        if parts.accelerator.is_main_process:
            try:
                removed = self._save(parts, progress, path, state)
            except (OSError, SafetensorError) as error:
                what = f"the checkpoint could not be written: {error}"
                fix = "make room or check the disk; started again, the run goes on from its newest checkpoint"
                raise UserError(Problem(str(path), what, fix)) from error
        parts.accelerator.wait_for_everyone()
        self._held_step = progress.step
        return Saved(progress, str(path), time.perf_counter() - started, tuple(removed))

    def held(self) -> Checkpoint | None:
        """The checkpoint that this run saved or restored last; None before the first."""
        return None if self._held_step is None else folders.read(self.output_dir / folders.folder_name(self._held_step))

    def save_if_newer(self, parts: Parts, progress: Progress) -> Saved | None:
        """Save unless this very step was just saved or restored, or nothing was trained yet."""
        if progress.step == 0 or progress.step == self._held_step:
            return None
        return self.save(parts, progress)

    def _save(self, parts: Parts, progress: Progress, path: Path, state: State | None) -> list[str]:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        removed = self._prune(room_for=1)
        staged = folders.aside(self.output_dir, progress.step, "tmp")
        staged.mkdir()
        try:
            serial = self._write(parts, progress, staged, state)
            folders.publish(staged, path, progress.step)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self._verified.add((path, serial))
        return removed + self._prune(room_for=0)

    def _write(self, parts: Parts, progress: Progress, staged: Path, state: State | None) -> int:
        """Write and sync everything of a checkpoint, the manifest last. Returns the serial."""
        state = state or State.of(parts)
        _write_model(parts, staged / "transformer", state.weights)
        if state.average:
            _write_model(parts, staged / "transformer_ema", state.average)
        _write_optimizer(state.optimizer, staged / OPTIMIZER)
        _write_json(staged / folders.PROGRESS, {**progress.to_json(), "run": self.identity})
        names = sorted(str(each.relative_to(staged).as_posix()) for each in staged.rglob("*") if each.is_file())
        for name in names:
            folders.sync_file(staged / name)
        complete = folders.list_complete(self.output_dir)
        serial = 1 + max((each.serial for each in complete), default=0)
        files = folders.digest_files(staged, names)
        _write_json(staged / folders.MANIFEST, {"step": progress.step, "serial": serial, "files": files})
        folders.sync_file(staged / folders.MANIFEST)
        for folder in [each for each in staged.rglob("*") if each.is_dir()]:
            sync_folder(folder)
        sync_folder(staged)
        return serial

    def _prune(self, room_for: int) -> list[str]:
        """Remove the oldest until the limit holds with `room_for` more, but never the newest verified one."""
        if self.limit <= 0:
            return []
        complete = folders.list_complete(self.output_dir)
        surplus = complete[: max(0, len(complete) + room_for - self.limit)]
        if not surplus:
            return []
        keep = self._newest_verified(complete)
        removed = []
        for each in surplus:
            if keep is None or each.path != keep.path:
                folders.remove(each)
                removed.append(str(each.path))
        return removed

    def _newest_verified(self, complete: list[Checkpoint]) -> Checkpoint | None:
        """What this process wrote or verified counts; an older one is read once."""
        for each in reversed(complete):
            if (each.path, each.serial) in self._verified or not folders.damage(each):
                self._verified.add((each.path, each.serial))
                return each
        return None


def _write_model(parts: Parts, folder: Path, state: Mapping[str, Tensor]) -> None:
    """A folder that diffusers' `from_pretrained` reads: config.json and one safetensors file."""
    folder.mkdir()
    # diffusers notes where the model came from: a path of this machine, which is nobody's business and differs by user
    config = {key: value for key, value in json.loads(parts.bare.to_json_string()).items() if key != "_name_or_path"}
    _write_json(folder / "config.json", config)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})


def _write_optimizer(state: Mapping[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise OSError(f"torch.save of {path.name} failed: {str(error).splitlines()[0]}") from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
    wanted, path = parts.ema.state_dict(), checkpoint.path / "transformer_ema" / WEIGHTS
    if wanted and path.exists():
        _load_weights(path, wanted)
    elif wanted:
        parts.ema.reset()
        log.warning("%s has no EMA; it starts from the weights of step %d", checkpoint.path, checkpoint.step)
    elif path.exists():
        log.warning("%s has an EMA, but use_ema is off: it is not carried on", checkpoint.path)


def _load_optimizer(parts: Parts, checkpoint: Checkpoint) -> None:
    path = checkpoint.path / OPTIMIZER
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        load_optimizer_state(parts.optimizer, state)
    except (ValueError, KeyError) as error:
        raise UserError(Problem(str(path), f"it is of another optimizer: {error}", FRESH)) from error
