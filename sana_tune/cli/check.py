"""`sana_tune check`: the report of a check on the screen, or as JSON for machines; exit code 0 or 1."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from signal import SIGINT
from textwrap import wrap
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from sana_tune.check import Dataset, Report, Setting, look_over
from sana_tune.cli.loading import load_asked
from sana_tune.errors import Interrupted, UserError
from sana_tune.plan import (
    BucketPlan,
    CacheNeed,
    Plan,
    dataset_lines,
    disk_line,
    evaluation_lines,
    human_bytes,
    length_line,
    memory_lines,
    noise_lines,
    rate_line,
    schedule_lines,
    time_lines,
)

if TYPE_CHECKING:
    from rich.console import Console

    from sana_tune.watch.bars import Bars

BUCKETS_SHOWN = 10  # of a dataset; --json has them all
SETTINGS_SHOWN = 40
WIDEST = 100  # columns; longer lines are hard to read
BARS_AFTER_S = 0.7  # a check that takes no longer shows no bars
_LABEL = 10  # columns of the labels on the left
Line = tuple[str, str]  # style, text


def check_asked(
    words: Sequence[str],
    config: str | None = None,
    env: str | None = None,
    example: str | None = None,
    *,
    as_json: bool = False,
    images: bool = False,
    left_out: bool = False,
) -> int:
    """Check the run that the flags name and say what was found. Answers the exit code: 1 when anything is wrong.

    left_out: print the paths of the pictures that are left out, one a line, and problems to standard error.
    """
    try:
        with Progress() as progress:
            report = _checked(words, config, env, example, images, progress)
    except KeyboardInterrupt:
        raise Interrupted(SIGINT) from None
    if left_out:
        print("".join(f"{path}\n" for path in report.left_out), end="")
        for problem in report.problems:
            print(f"error: {problem}", file=sys.stderr)
    elif as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2, default=str))
    else:
        show(report)
    return 0 if report.ok else 1


def _checked(
    words: Sequence[str], config: str | None, env: str | None, example: str | None, images: bool, progress: Progress
) -> Report:
    try:
        loaded, notes = load_asked(words, config, env, example)
    except UserError as error:
        return Report(problems=error.problems)
    return look_over(loaded, notes, images=images, report=progress.tell)


def show(report: Report, console: Console | None = None) -> None:
    """Print a report: what will happen, and below it, where nobody misses it, what is wrong."""
    if console is None:
        from sana_tune import log as logs

        console = logs.console()
    width = min(console.width, WIDEST)
    for style, text in screen(report, width):
        console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


def screen(report: Report, width: int = 80) -> Iterator[Line]:
    """The lines of the screen with their styles, none longer than `width` if it can be broken."""
    if report.config:
        yield "bold", f"Check of {_near(report.config)}"
    if report.settings:
        yield from _settings(report.settings, width)
    if report.model is not None:
        yield from _labelled("Model", [_model(report)], width)
    for dataset in report.datasets:
        yield "", ""
        yield from _dataset(dataset, report, width)
    if report.plan is not None:
        yield "", ""
        yield from _plan(report.plan, width)
    for label, style, texts in (("Notes", "", report.notes), ("Warnings", "yellow", report.warnings)):
        if texts:
            yield "", ""
            yield f"{style} bold".strip(), label
            for text in texts:
                yield from ((style, line) for line in _wrapped(f"- {text}", width, 2))
    yield "", ""
    yield from _verdict(report, width)


def _verdict(report: Report, width: int) -> Iterator[Line]:
    """The problems, and the last line."""
    for problem in report.problems:
        yield from (("red", line) for line in _wrapped(f"error: {problem.where}: {problem.what}", width, 4))
        if problem.fix:
            yield from (("", line) for line in _wrapped(f"  → {problem.fix}", width, 4))
    if report.ok:
        warned = f" ({_count(len(report.warnings), 'warning')})" if report.warnings else ""
        yield "green bold", f"ok: nothing is wrong{warned}"
    else:
        yield "red bold", _count(len(report.problems), "problem")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


# ---- settings and model ----


def _settings(settings: Sequence[Setting], width: int) -> Iterator[Line]:
    """The settings that differ: name, value, default and origin in columns."""
    yield "", ""
    yield "bold", "Settings that differ from the defaults"
    rows = [(each.key, _shown(each.value), _shown(each.default), _origin(each)) for each in settings[:SETTINGS_SHOWN]]
    rows.insert(0, ("", "value", "default", "from"))
    name, default, origin = (max(len(row[column]) for row in rows) for column in (0, 2, 3))
    value = max(12, min(max(cell_len(row[1]) for row in rows), width - name - default - origin - 8))
    for row in rows:
        shown = _cut(row[1], value)
        shown += " " * (value - cell_len(shown))
        cells = f"  {row[0]:{name}}  {shown}  {row[2]:{default}}  {row[3]}"
        yield "dim" if not row[0] else "", cells.rstrip()
    if len(settings) > SETTINGS_SHOWN:
        yield "", f"  … and {len(settings) - SETTINGS_SHOWN} more (--json)"
    yield "", ""


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str, width: int) -> str:
    """Text in `width` columns of a terminal; of a long one the end, which tells paths apart."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[1:]
    return f"…{text}"


def _origin(setting: Setting) -> str:
    """Where a value comes from, short: the file's name, without the key where it is the same."""
    place, _, key = setting.origin.partition(": ")
    name = Path(place).name if "/" in place or "\\" in place else place
    same = key.strip().lstrip("-").replace("-", "_") in (setting.key, "")
    return name if same else f"{name}: {_cut(key, 20)}"


def _near(path: str) -> str:
    """A path as seen from the working directory."""
    return path.removeprefix(f"{Path.cwd()}/")


def _model(report: Report) -> str:
    model, plan = report.model, report.plan
    assert model is not None
    size = f", {plan.parameters / 1e6:,.1f} M parameters, flow shift {plan.flow_shift:g}" if plan else ""
    where = "" if model.folder else f"; not on this machine, about {human_bytes(model.fetch_bytes)} to download"
    return f"{model.name}{size}{where}. Licence: {model.licence}"


# ---- data ----


def _dataset(dataset: Dataset, report: Report, width: int) -> Iterator[Line]:
    """A dataset: its files, buckets, captions and pictures."""
    yield "bold", f"Dataset {dataset.id}  {_near(dataset.folder)}"
    settings = ", ".join(f"{key} {_shown(value)}" for key, value in dataset.settings.items())
    if settings:
        yield from (("dim", line) for line in _wrapped(f"  {settings}", width, 2))
    ledger = next(part for part in (report.ledger.datasets if report.ledger else ()) if part.dataset == dataset.id)
    for text in dataset_lines(ledger, report.plan):
        yield from (("", line) for line in _wrapped(f"  {text}", width, 6 if text.startswith(" ") else 4))
    if report.plan is not None:
        yield from _buckets([bucket for bucket in report.plan.buckets if bucket.dataset == dataset.id])
        yield from _held_out([bucket for bucket in report.plan.held_out if bucket.dataset == dataset.id])
    if not ledger.trained:
        return
    yield from (("", line) for line in _wrapped(f"  captions: {_captions(dataset)}", width, 4))
    yield from (("", line) for line in _wrapped(f"  pictures: {_shapes(dataset)}", width, 4))


def _buckets(buckets: Sequence[BucketPlan]) -> Iterator[Line]:
    """The buckets of a dataset in columns, the largest first."""
    if not buckets:
        return
    rows: list[tuple[str, ...]] = [("bucket", "images", "passes", "batches", "of", "filled", "shift")]
    ordered = sorted(buckets, key=lambda bucket: (-bucket.pictures, bucket.width_px, bucket.height_px))
    for each in ordered[:BUCKETS_SHOWN]:
        size, passes = f"{each.width_px}x{each.height_px}", each.repeats + 1
        numbers = (each.pictures, passes, each.micro_batches, each.batch_size, each.filled)
        rows.append((size, *(f"{number:,}" for number in numbers), f"{each.flow_shift:g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "dim" if row is rows[0] else "", f"    {row[0]:{widths[0]}}  {text}"
    rest = len(buckets) - BUCKETS_SHOWN
    if rest > 0:
        left = sum(bucket.pictures for bucket in ordered[BUCKETS_SHOWN:])
        yield "", f"    … and {_count(rest, 'bucket')} more with {_count(left, 'image')} (--json)"


def _held_out(buckets: Sequence[BucketPlan]) -> Iterator[Line]:
    """The buckets of a held-out dataset, which no epoch shows."""
    if not buckets:
        return
    rows = [(f"{each.width_px}x{each.height_px}", f"{each.pictures:,}") for each in buckets[:BUCKETS_SHOWN]]
    width = max(len("bucket"), *(len(size) for size, _ in rows))
    yield "dim", f"    {'bucket':{width}}  images"
    for size, pictures in rows:
        yield "", f"    {size:{width}}  {pictures:>6}"
    if len(buckets) > BUCKETS_SHOWN:
        yield "", f"    … and {_count(len(buckets) - BUCKETS_SHOWN, 'bucket')} more (--json)"


def _captions(dataset: Dataset) -> str:
    found = dataset.captions
    doubts = {
        "missing": found.missing,
        "empty": found.empty,
        "the same as another's": found.repeated,
        "over 300 tokens": found.too_long or 0,
        "with a placeholder": found.placeholder,
    }
    uncounted = ["not counted in tokens (no tokenizer here)"] if found.too_long is None else []
    told = [*(f"{number:,} {doubt}" for doubt, number in doubts.items() if number), *uncounted]
    return f"{found.variants:,}; {', '.join(told) or 'nothing amiss'}"


def _shapes(dataset: Dataset) -> str:
    found, told = dataset.shapes, []
    if found.enlarged:
        told.append(f"{found.enlarged:,} enlarged, up to {found.largest_factor:.2f} times")
    if found.extreme:
        told.append(f"{found.extreme:,} wider than 4:1 or narrower than 1:4")
    if found.cropped:
        told.append(f"{found.cropped:,} cropped to less than half")
    return ", ".join(told) or "none enlarged, none of extreme shape"


# ---- the plan ----


def _plan(plan: Plan, width: int) -> Iterator[Line]:
    """Length, caches, disk, memory and time."""
    yield from _labelled("Length", [length_line(plan), *schedule_lines(plan)], width)
    yield from _labelled("Noise", noise_lines(plan), width)
    yield from _labelled("Rate", [rate_line(plan)], width)
    if plan.weights.why:
        yield from _labelled("Weights", [f"{plan.weights.dtype} ({plan.weights.why})"], width)
    yield from _labelled("Adapter", plan.adapter, width)
    yield from _labelled("Caches", [_cache(cache) for cache in plan.caches], width)
    yield from _labelled("Disk", [disk_line(plan)], width)
    yield from _labelled("Held-out", evaluation_lines(plan), width)
    yield from _labelled("Memory", memory_lines(plan), width)
    known = time_lines(plan) or ["not known: nothing was trained here at this pace yet"]
    yield from _labelled("Time", known if plan.steps_left else ["all steps are done"], width)


def _cache(cache: CacheNeed) -> str:
    if cache.mode == "none":
        return f"{cache.name}: not kept; encoded at every visit"
    unknown = f", {cache.unknown:,} unknown (never hashed yet)" if cache.unknown else ""
    when = " when first needed" if cache.mode == "ondemand" else ""
    to_come = f", about {human_bytes(cache.bytes_to_make)} to come" if cache.bytes_to_make else ""
    return f"{cache.name}: {cache.hits:,} of {cache.needed:,} there, {cache.misses:,} to make{when}{unknown}{to_come}"


def _labelled(label: str, texts: Sequence[str], width: int) -> Iterator[Line]:
    """Lines beside a label on the left."""
    for number, text in enumerate(texts):
        head = label if number == 0 else ""
        indent = 2 if text.startswith(" ") else 0
        lines = _wrapped(" " * indent + text.strip(), width - _LABEL, 2 + indent)
        for place, line in enumerate(lines):
            yield "", f"{head if place == 0 else '':{_LABEL}}{line}"


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    """The text in lines of at most `width` columns, those after the first indented; long words stay whole."""
    first = " " * (len(text) - len(text.lstrip()))
    lines = wrap(
        text.strip(), width, initial_indent=first, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return lines or [""]


class Progress:
    """Bars on standard error, when that is a terminal and the check takes long enough to want them."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._bars: Bars | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bars is not None:
            self._bars.stop()

    def tell(self, title: str, done: int, total: int) -> None:
        """So much of it is done."""
        if self._bars is None:
            if time.monotonic() - self._begun < BARS_AFTER_S or not sys.stderr.isatty():
                return
            from rich.console import Console

            from sana_tune.watch.bars import Bars

            self._bars = Bars(Console(stderr=True), 8.0)
            self._bars.start()
        self._bars.show(title, done, total)
