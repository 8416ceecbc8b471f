"""`sana_tune cache stats|verify|gc|explain`: what the caches of a run hold, on the screen or as JSON for machines."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from signal import SIGINT
from typing import Any

import typer

from sana_tune.cli.check import Progress
from sana_tune.cli.loading import load_asked
from sana_tune.config.load import Loaded, load
from sana_tune.errors import Interrupted, Problem, UserError
from sana_tune.inventory import (
    Explained,
    Made,
    Shelf,
    Stock,
    Swept,
    explain,
    mend,
    shelves,
    stock,
    surveyed,
    sweep,
    verified,
    wanted,
)
from sana_tune.output import Output
from sana_tune.plan import human_bytes

_NAMES_SHOWN = 5
_WIDEST_NAME = 12  # columns of the names of a key's parts


def tell_stats(loaded: Loaded, *, as_json: bool = False) -> None:
    """What each cache folder holds, and what of it the run needs."""
    needed = wanted(surveyed(loaded))
    found = [stock(shelf, needed.get(shelf.folder.absolute(), ())) for shelf in _shelves(loaded)]
    if as_json:
        return _tell_json([{**asdict(one), "misses": one.misses} for one in found])
    typer.echo("\n\n".join("\n".join(_stock_lines(one)) for one in found))


def tell_verified(loaded: Loaded, *, as_json: bool = False, aside: bool = False) -> int:
    """Read every cache whole and compare all checksums. Answers the exit code: 1 when anything is damaged.

    aside: set damaged files aside, so that what is lost is made again by the next run.
    """
    damaged: list[dict[str, Any]] = []
    counted = 0
    with Progress() as progress:
        for shelf in _shelves(loaded):
            title = f"Verifying {', '.join(shelf.titles)}"
            items, found = verified(shelf, lambda done, total, title=title: progress.tell(title, done, total))
            counted += items
            if aside and found:
                mend(shelf, (bad for bad, _ in found))
            folder = str(shelf.folder)
            damaged += [{"folder": folder, "file": bad.file, "what": bad.what, "items": one} for bad, one in found]
    if as_json:
        _tell_json({"ok": not damaged, "items": counted, "damaged": damaged})
        return 1 if damaged else 0
    for bad in damaged:
        typer.echo(f"damaged: {Path(bad['folder']) / bad['file']}: {bad['what']}{_few(bad['items'])}")
    if damaged:
        count = f"{len(damaged)} damaged file{'s' * (len(damaged) != 1)}"
        if aside:
            typer.echo(
                f"{count}, set aside with what was sound in them kept; `sana_tune cache warm` makes the rest again"
            )
        else:
            typer.echo(f"{count}: a run makes again what it needs of them; --set-aside has all of it made again")
        return 1
    typer.echo(f"ok: {counted:,} items, every one as it was written")
    return 0


def clear(loaded: Loaded, others: Sequence[str], *, for_good: bool = False) -> None:
    """Remove what neither this run nor those of the configs `others` need; unless `for_good`, only say what."""
    keep = dict(wanted(surveyed(loaded)))
    for path in others:
        for folder, keys in wanted(surveyed(_other(path))).items():
            keep[folder] = keep.get(folder, frozenset()) | keys
    items = bytes_ = files = 0
    for shelf in _shelves(loaded):
        kept = keep.get(shelf.folder.absolute(), frozenset())
        if for_good:
            swept = sweep(shelf, kept)
        else:
            there = stock(shelf, kept)
            swept = Swept(there.idle_items, len(there.set_aside) + len(there.damaged), there.idle_bytes)
        items, bytes_, files = items + swept.items, bytes_ + swept.bytes, files + swept.files
        if swept.items or swept.files:
            typer.echo(f"{', '.join(shelf.titles)} ({shelf.folder}): {_swept(swept)}")
    if not items and not files:
        return typer.echo("nothing to remove: the caches hold what is needed and nothing else")
    verb = "removed" if for_good else "to be removed"
    typer.echo(f"{verb}: {_swept(Swept(items, files, bytes_))}")
    if not for_good:
        typer.echo(
            "add --yes to remove them; name other configs that share these caches with --keep CONFIG. What is "
            "removed and needed again is made again"
        )


def tell_explained(loaded: Loaded, name: str, *, as_json: bool = False) -> int:
    """What the keys of a picture are made of, and why they hit or miss. Answers 1 when it is not trained at all."""
    found = explain(surveyed(loaded), name)
    if as_json:
        _tell_json([asdict(one) for one in found])
    else:
        typer.echo("\n\n".join("\n".join(_explained_lines(one)) for one in found))
    return 1 if all(one.left_out is not None for one in found) else 0


@contextmanager
def asked(words: Sequence[str], config: str | None, env: str | None, example: str | None) -> Iterator[Loaded]:
    """The run that the flags name, as `train` takes them. Ctrl-C in here ends with its exit code."""
    try:
        yield load_asked(words, config, env, example)[0]
    except KeyboardInterrupt:
        raise Interrupted(SIGINT) from None


def _other(path: str) -> Loaded:
    if not os.path.isfile(path):
        raise UserError(Problem("--keep", f"{path} does not exist", "name the config.json of another run"))
    return load(Path(path), {})


def _shelves(loaded: Loaded) -> tuple[Shelf, ...]:
    return shelves(loaded, Output(Path(loaded.config.train.output_dir)))


def _tell_json(values: Any) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, indent=2, default=str))


def _stock_lines(one: Stock) -> Iterator[str]:
    yield f"{', '.join(one.titles)}: {one.folder}"
    yield f"  {one.items:,} items in {one.files:,} files, {human_bytes(one.bytes)}"
    yield f"  this run needs {one.needed:,}: {one.hits:,} there, {one.misses:,} to make"
    if one.idle_items:
        idle = f"{one.idle_items:,} items, {human_bytes(one.idle_bytes)}"
        yield f"  {idle} are of no use to this run, maybe to another one: `sana_tune cache gc` removes them"
    for name, what in one.damaged.items():
        yield f"  damaged: {name}: {what}; the next run sets it aside and makes its items again"
    if one.set_aside:
        yield f"  set aside because damaged: {_listed(one.set_aside)}; `sana_tune cache gc` removes them"
    if one.foreign:
        yield f"  not ours, left alone: {_listed(one.foreign)}"
    if one.busy:
        yield "  another process is writing here now"


def _explained_lines(one: Explained) -> Iterator[str]:
    yield f"{one.dataset}/{one.key} ({one.path})"
    if one.left_out is not None:
        yield f"  left out: {one.left_out}"
    for made in one.made:
        yield ""
        yield from _made_lines(made)


def _made_lines(made: Made) -> Iterator[str]:
    yield f"  {made.what}: {made.state}: {made.why}"
    for name, value in (*made.parts, ("key", made.key), ("cache", shlex.quote(made.folder))):
        yield f"    {name:{_WIDEST_NAME}} {value}"


def _swept(swept: Swept) -> str:
    """What goes, in words."""
    parts = [f"{swept.items:,} items"] * bool(swept.items)
    parts += [f"{swept.files:,} damaged file{'s' * (swept.files != 1)}"] * bool(swept.files)
    return f"{' and '.join(parts)}, {human_bytes(max(0, swept.bytes))}"


def _few(names: Sequence[str]) -> str:
    return f" ({_listed(names)})" if names else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
