"""Checkpoint folders: their names, when one is complete, which is the newest, and how folders come and go.

A checkpoint is written into a hidden folder beside the others and renamed when it is whole, so a folder named
checkpoint-<step> with a manifest is complete. What is removed is renamed first, for the same reason.
No torch, so that a wrong path is found before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config.lycoris import ADAPTER, WHOLE, Layout
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.store import sync_folder

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
FRESH = "name another output_dir, or begin anew with --restart"
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = re.compile(r"\.(checkpoint-\d+)\.(tmp|old|trash)-(\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder.

    serial: a count that each save in the output folder raises; the newest checkpoint has the highest. After going
            back to an earlier step it tells this course's checkpoints from the abandoned ones.
    files:  relative path → {"sha256": hex, "size": bytes}.
    rolling: it was saved against crashes alone, and goes when a newer such one is there.
    """

    path: Path
    step: int
    serial: int
    files: dict[str, dict[str, Any]]
    rolling: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry["size"] for entry in self.files.values())

    @property
    def layout(self) -> Layout:
        """Of an adapter, or of a whole transformer."""
        return ADAPTER if ADAPTER.weights in self.files else WHOLE

    def progress(self) -> Progress:
        """Where the run stood. Raises UserError when progress.json cannot be read."""
        return Progress.from_json(self.header())

    def header(self) -> dict[str, Any]:
        """The values of progress.json: the position, and under "run" what the run was. Raises UserError."""
        try:
            header = json.loads((self.path / PROGRESS).read_text(encoding="utf-8"))
            Progress.from_json(header)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(Problem(str(self.path / PROGRESS), f"it cannot be read: {error}", _OTHER)) from error
        return header


_OTHER = "resume from another checkpoint (--resume_from_checkpoint PATH), or remove this folder"


def folder_name(step: int) -> str:
    return f"checkpoint-{step}"


def read(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None when it is not complete: no manifest, or a file missing or cut short.

    Reads sizes only; `verify` reads everything.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, serial, files = int(manifest["step"]), int(manifest["serial"]), dict(manifest["files"])
        found = Checkpoint(path, step, serial, files, manifest.get("rolling") is True)
        whole = all((path / name).stat().st_size == entry["size"] for name, entry in found.files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole and PROGRESS in found.files else None


def list_complete(output_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of an output folder, oldest save first. Hidden folders do not count."""
    found = (read(path) for path in named(output_dir))
    return sorted((each for each in found if each is not None), key=lambda each: (each.serial, each.step))


def named(output_dir: Path) -> list[Path]:
    """The folders that have a checkpoint's name, complete or not."""
    if not output_dir.is_dir():
        return []
    return sorted(path for path in output_dir.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def find(output_dir: Path, wanted: str | None) -> Checkpoint | None:
    """The checkpoint to resume from: "latest" (the newest complete one, None if there is none), a path or a
    folder's name inside `output_dir`; "" or None: none.

    Incomplete folders are passed over, and said so. Raises UserError, listing what there is, when a named one does
    not exist or is not complete.
    """
    if not wanted:
        return None
    if wanted == "latest":
        return _latest(output_dir)
    for path in (Path(wanted), output_dir / wanted):
        if path.is_dir():
            found = read(path)
            if found is None:
                raise UserError(_unusable(path, "it is not a complete checkpoint", output_dir))
            return found
    raise UserError(_unusable(Path(wanted), "there is no such checkpoint", output_dir))


def _latest(output_dir: Path) -> Checkpoint | None:
    complete = list_complete(output_dir)
    whole = {each.path for each in complete}
    for path in named(output_dir):
        if path not in whole:
            log.warning("%s is not complete and is passed over", path)
    if not complete:
        return None
    ahead = [each.path.name for each in complete if each.step > complete[-1].step]
    if ahead:
        log.warning("%s: saved before %s, in a course that was left", ", ".join(ahead), complete[-1].path.name)
    return complete[-1]


def _unusable(path: Path, what: str, output_dir: Path) -> Problem:
    complete = list_complete(output_dir)
    if not complete:
        return Problem(f"resume_from_checkpoint {path}", what, f"{output_dir} has none; leave the key out to start")
    names = ", ".join(each.path.name for each in sorted(complete, key=lambda each: each.step))
    return Problem(f"resume_from_checkpoint {path}", what, f'take "latest" or one of those in {output_dir}: {names}')


def digest_files(root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, several at a time; of one that cannot be read nothing."""
    listed = list(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(listed, pool.map(lambda name: _digest(root / name), listed), strict=True))


def _digest(path: Path) -> dict[str, Any]:
    """The manifest's entry; empty for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": os.fstat(file.fileno()).st_size}
    except OSError:
        return {}


def damage(checkpoint: Checkpoint, part: str = "") -> list[str]:
    """The files whose content is not what the manifest says, or that cannot be read; empty = verified.

    part: how the names of the files begin that are looked at.
    """
    names = [name for name in checkpoint.files if name.startswith(part)]
    now = digest_files(checkpoint.path, names)
    return [name for name in names if now[name] != checkpoint.files[name]]


def verify(checkpoint: Checkpoint) -> None:
    """Read the whole checkpoint. Raises UserError naming the damaged files."""
    damaged = damage(checkpoint)
    if damaged:
        what = f"damaged: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} not as it was saved"
        raise UserError(Problem(str(checkpoint.path), what, _OTHER))


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise UserError with every difference between `identity` (what this run is) and what the checkpoint's run was."""
    held = checkpoint.header().get("run", {})
    problems = [
        Problem(str(checkpoint.path), f"trained with {key} {held[key]!r}; this run has {value!r}", FRESH)
        for key, value in identity.items()
        if key in held and held[key] != value
    ]
    if problems:
        raise UserError(*problems)


def aside(output_dir: Path, step: int, kind: str) -> Path:
    """A new hidden name beside checkpoint-<step>. kind: tmp (being written), old (replaced), trash (removed)."""
    return output_dir / f".{folder_name(step)}.{kind}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def publish(staged: Path, target: Path, step: int) -> None:
    """Give a staged folder its name. A checkpoint of that name is moved aside first and removed after."""
    parent = target.parent
    replaced = None
    if target.exists():
        replaced = aside(parent, step, "old")
        os.rename(target, replaced)
    os.rename(staged, target)
    sync_folder(parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def remove(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint. It is renamed first: a kill in between leaves no half of it under its name."""
    trash = aside(checkpoint.path.parent, checkpoint.step, "trash")
    os.rename(checkpoint.path, trash)
    shutil.rmtree(trash)


def clean(output_dir: Path) -> None:
    """Remove what killed runs left. A replaced checkpoint whose successor never came gets its name back."""
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if not match or _alive(int(match[3])):
            continue
        name, kind = match[1], match[2]
        held = read(path) if kind == "old" and not (output_dir / name).exists() else None
        if held is not None and not damage(held):
            os.rename(path, output_dir / name)
            log.warning("%s was being replaced when a run was killed; it is put back", output_dir / name)
        else:
            shutil.rmtree(path)
            log.info("removed %s, left behind by a killed run", path)


def _alive(pid: int) -> bool:
    """Whether a process of that id runs on this machine (this one's own leftovers count as dead)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
