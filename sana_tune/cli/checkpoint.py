"""`sana_tune checkpoint list|verify`: the checkpoints of a run, on the screen or as JSON for machines. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from signal import SIGINT
from typing import Any

import typer

from sana_tune.cli.draw import sorted_out
from sana_tune.cli.loading import settings_asked
from sana_tune.config.load import load_settings
from sana_tune.errors import Interrupted, Problem, UserError, gather
from sana_tune.plan import human_bytes
from sana_tune.saving import Keeping, best, keeping_of, reasons
from sana_tune.train import folders
from sana_tune.train.folders import Checkpoint
from sana_tune.train.judged import Judged, stands_of


@dataclass(frozen=True)
class Listed:
    """A complete checkpoint as it is told. best: its place among all by held-out loss, 1 = the lowest; None = unknown.

    kept: why it stays; () = the next save removes it. None where the run's settings are not known.
    """

    checkpoint: Checkpoint
    epoch: float | None  # None: progress.json cannot be read
    saved: datetime
    loss: float | None
    best: int | None
    kept: tuple[str, ...] | None
    newest: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """What it has."""
        names = {name.partition("/")[0] for name in self.checkpoint.files}
        known = {"transformer": "weights", "transformer_ema": "EMA", "optimizer.pt": "optimizer"}
        return tuple(title for name, title in known.items() if name in names)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        one = self.checkpoint
        return {
            "path": str(one.path), "step": one.step, "epoch": self.epoch, "saved": self.saved.isoformat(),
            "size_bytes": one.size_bytes, "parts": list(self.parts), "complete": True, "newest": self.newest,
            "rolling": one.rolling, "held_out": self.loss, "best": self.best,
            "kept": None if self.kept is None else list(self.kept),
        }  # fmt: skip

    @property
    def line(self) -> str:
        """One line of the list."""
        why = ["newest"] * self.newest + list(self.kept or ())
        held = f", kept: {'; '.join(why)}" if why else ", goes with the next save" if self.kept == () else ""
        loss = "" if self.loss is None else f", held-out loss {self.loss:.4g} (place {self.best})"
        rolling = ", rolling" * self.checkpoint.rolling
        epoch = "?" if self.epoch is None else f"{self.epoch:.4g}"
        return (
            f"{self.checkpoint.path.name}: epoch {epoch}, {self.saved:%Y-%m-%d %H:%M}, "
            f"{human_bytes(self.checkpoint.size_bytes)} ({', '.join(self.parts)}){rolling}{loss}{held}"
        )


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C in here ends with its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(SIGINT) from None


def tell_list(words: Sequence[str], config: str | None, env: str | None, example: str | None, as_json: bool) -> None:
    """List the checkpoints of a folder; incomplete ones are named."""
    folder, keeping = asked(words, config, env, example)
    found, torn = listed(folder, keeping), incomplete(folder)
    if as_json:
        values = [each.to_json() for each in found] + [{"path": str(path), "complete": False} for path in torn]
        return typer.echo(json.dumps(values, indent=2))
    if not found and not torn:
        return typer.echo(f"no checkpoints in {folder}")
    typer.echo(f"{folder}: {len(found)} complete, {human_bytes(sum(each.checkpoint.size_bytes for each in found))}")
    for each in found:
        typer.echo(f"  {each.line}")
    for path in torn:
        typer.echo(f"  {path.name}: not complete: it is passed over, and never removed by a run")


def tell_verified(words: Sequence[str], config: str | None, env: str | None, example: str | None, as_json: bool) -> int:
    """Read every checkpoint of a folder whole and compare all checksums. Answers 1 when anything is wrong."""
    folder, _ = asked(words, config, env, example)
    one = folders.read(folder)
    complete, torn = ([one], []) if one else (folders.list_complete(folder), incomplete(folder))
    damaged: dict[str, list[str]] = {}
    for each in complete:
        if wrong := folders.damage(each):
            damaged[str(each.path)] = wrong
        if not as_json:
            typer.echo(f"{each.path}: {'damaged: ' + ', '.join(wrong) if wrong else 'ok'}")
    if as_json:
        values = {"ok": not damaged and not torn, "verified": len(complete), "damaged": damaged}
        typer.echo(json.dumps({**values, "incomplete": [str(path) for path in torn]}, indent=2))
    else:
        for path in torn:
            typer.echo(f"{path}: not complete")
        if not complete and not torn:
            typer.echo(f"no checkpoints in {folder}")
    return int(bool(damaged or torn))


def asked(
    words: Sequence[str], config: str | None, env: str | None, example: str | None
) -> tuple[Path, Keeping | None]:
    """The folder that the words name, else that of the config; and what stays there, as far as that is known."""
    texts, settings = sorted_out(words)
    if not texts:
        found = settings_asked(settings, config, env, example)
        return Path(found.train.output_dir), keeping_of(found)
    if len(texts) > 1 or settings or config or env or example:
        raise UserError(Problem(" ".join(words), "a folder stands alone", "name one folder, or settings of a run"))
    folder = Path(texts[0])
    if not folder.is_dir():
        raise UserError(Problem(texts[0], "must be the folder of a run, or a checkpoint's; it is not there"))
    try:
        return folder, keeping_of(load_settings(folder / "config.json", {}))
    except UserError:  # not a run's folder, or of another version: what stays is not told then
        return folder, None


def listed(folder: Path, keeping: Keeping | None) -> list[Listed]:
    """The complete checkpoints, by step."""
    complete = folders.list_complete(folder)
    losses = Judged(folder).losses
    stands = stands_of(complete, losses)
    why = [None] * len(stands) if keeping is None else reasons(stands, keeping)
    places = {place: rank for rank, place in enumerate(best(stands, len(stands)), start=1)}
    found = [
        Listed(
            each,
            _epoch(each),
            datetime.fromtimestamp((each.path / folders.MANIFEST).stat().st_mtime).astimezone(),
            losses.get(each.step),
            places.get(number),
            why[number],
            number == len(complete) - 1,
        )
        for number, each in enumerate(complete)
    ]
    return sorted(found, key=lambda one: one.checkpoint.step)


def _epoch(checkpoint: Checkpoint) -> float | None:
    progress = gather([], checkpoint.progress)
    return progress and progress.epoch


def incomplete(folder: Path) -> list[Path]:
    """Folders that have a checkpoint's name and are none."""
    return [path for path in folders.named(folder) if folders.read(path) is None]
