"""The report's pictures: made small once each, and put in order: prompt × step, previews, first batches."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sana_tune.log import log
from sana_tune.watch.report.reading import FIRST_BATCHES, Picture, Run

SIDE_PX = 320
MOST = 240  # pictures of the timeline in one report, about 3 MB
MOST_ROWS = 40

# A picture file's bytes and the longest side wanted, px → WebP bytes, width and height.
Shrink = Callable[[bytes, int], tuple[bytes, int, int]]


class Thumb(NamedTuple):
    """A small picture that stands in the page."""

    url: str
    width: int
    height: int


class Thumbs:
    """Small pictures of files; each is made once, and again when its file changed. What cannot be read is None."""

    def __init__(self, shrink: Shrink, side_px: int = SIDE_PX):
        self._shrink, self._side_px = shrink, side_px
        self._made: dict[Path, tuple[tuple[int, int], Thumb | None]] = {}

    def of(self, path: Path) -> Thumb | None:
        """The small picture of a file."""
        try:
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_size)
            if path not in self._made or self._made[path][0] != mark:
                self._made[path] = (mark, self._make(path))
        except OSError:  # gone, or half written
            return None
        return self._made[path][1]

    def _make(self, path: Path) -> Thumb | None:
        try:
            data, width, height = self._shrink(path.read_bytes(), self._side_px)
        except ValueError as error:
            log.debug("no small picture of %s", path, exc_info=error)
            return None
        return Thumb("data:image/webp;base64," + base64.b64encode(data).decode("ascii"), width, height)


def timeline(runs: Sequence[Run], thumbs: Thumbs, beside: Path) -> dict[str, Any]:
    """Rows (a prompt at a size) of each run with their pictures by step and view.

    beside: the folder of the page, for links to the files. left_out: pictures that are not shown, for want of room.
    """
    rows: dict[tuple[str, int, int, int], dict[str, Any]] = {}
    steps: set[int] = set()
    left_out = 0
    for number, run in enumerate(runs):
        keys = list(dict.fromkeys(_row(picture) for picture in run.pictures))[:MOST_ROWS]
        shown = set(_steps_shown(run, len(keys) * len(runs)))
        for picture in run.pictures:
            key = _row(picture)
            thumb = thumbs.of(picture.path) if picture.step in shown and key in keys else None
            if thumb is None:
                left_out += 1
                continue
            steps.add(picture.step)
            row = rows.setdefault(key, _new_row(picture, run.prompts, len(runs)))
            row["pictures"][number].setdefault(str(picture.step), {})[picture.view] = {
                "src": thumb.url, "w": thumb.width, "h": thumb.height, "href": link(picture.path, beside),
            }  # fmt: skip
    return {"steps": sorted(steps), "rows": [rows[key] for key in sorted(rows)], "left_out": left_out}


def _row(picture: Picture) -> tuple[str, int, int, int]:
    return picture.slug, picture.nth, picture.width_px, picture.height_px


def _new_row(picture: Picture, prompts: Mapping[str, Mapping[str, str]], runs: int) -> dict[str, Any]:
    told = prompts.get(picture.slug, {})
    return {
        "name": str(told.get("name", picture.slug)),
        "prompt": str(told.get("prompt", "")),
        "size": f"{picture.width_px}×{picture.height_px}",
        "index": picture.nth,
        "pictures": [{} for _ in range(runs)],
    }


def _steps_shown(run: Run, rows: int) -> list[int]:
    """The steps whose pictures have room: the first, the last and some between, evenly."""
    steps = sorted({picture.step for picture in run.pictures})
    views = len({picture.view for picture in run.pictures})
    most = max(3, MOST // max(1, rows * views))
    if len(steps) <= most:
        return steps
    return sorted({steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)})


def previews(run: Run, thumbs: Thumbs) -> list[dict[str, Any]]:
    """Half-finished samples of the newest step that has any: prompt by prompt, in the order of the sampler."""
    lines = run.of("previewed")
    newest = max((line["step"] for line in lines), default=0)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        thumb = thumbs.of(run.root / str(line.get("file", ""))) if line["step"] == newest else None
        if thumb is not None:
            at, of = line.get("sampler_step"), line.get("sampler_steps")
            shown = {"thumb": thumb, "at": at, "of": of}
            found.setdefault(str(line.get("prompt", "")), {})[int(at or 0)] = shown
    return [
        {
            "name": str(run.prompts.get(slug, {}).get("name", slug)),
            "prompt": str(run.prompts.get(slug, {}).get("prompt", "")),
            "step": newest,
            "pictures": [steps[at] for at in sorted(steps)],
        }
        for slug, steps in found.items()
    ]


def first_batches(run: Run, thumbs: Thumbs) -> list[dict[str, Any]]:
    """The first training pictures with what is known of each."""
    folder, found = run.root / FIRST_BATCHES, []
    for entry in run.first_batches:
        thumb = thumbs.of(folder / str(entry.get("file", "")))
        if thumb is not None:
            masked = entry.get("masked")
            found.append({**entry, "thumb": thumb, "masked": thumbs.of(folder / str(masked)) if masked else None})
    return found


def link(path: Path, beside: Path) -> str:
    """The address of a file as seen from a page in the folder `beside`."""
    try:
        near = os.path.relpath(path.resolve(), beside.resolve())
    except ValueError:  # another drive
        return path.resolve().as_uri()
    return quote(near.replace(os.sep, "/"))
