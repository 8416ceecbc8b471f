"""report.html: one file that holds all it shows. Values in, text out; the looks are in assets/report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from sana_tune import __version__
from sana_tune.store import write_atomically
from sana_tune.watch.report import content, images, words
from sana_tune.watch.report.charts import charts_of
from sana_tune.watch.report.reading import Reader, Run
from sana_tune.watch.report.settings import Setting, settings_of

FILE = "report.html"
_ASSETS = Path(__file__).resolve().parents[2] / "assets" / "report"


def _now() -> datetime:
    return datetime.now(UTC)


class Reporter:
    """Writes the report of one run, or of several beside each other; what it read and made small it keeps.

    folders: of the runs. shrink: makes pictures small.
    """

    def __init__(self, folders: Sequence[Path], shrink: images.Shrink, now: Callable[[], datetime] = _now):
        self._readers = [Reader(folder) for folder in folders]
        self._thumbs = images.Thumbs(shrink)
        self._now = now

    def write(self, path: Path, *, live: bool = False) -> None:
        """Replace the file at `path`. live: whether the run is known to go on. Raises UserError when it cannot be."""
        write_atomically(path, self.text(path.parent, live=live).encode("utf-8"))

    def text(self, beside: Path, *, live: bool = False) -> str:
        """The page. beside: the folder that it is to lie in."""
        runs = [reader.read() for reader in self._readers]
        charts = charts_of(runs)
        timeline = images.timeline(runs, self._thumbs, beside)
        named = told_apart([run.name for run in runs])
        shown = [self._run(run, name, number, live) for number, (run, name) in enumerate(zip(runs, named, strict=True))]
        settings = settings_of(runs)
        values = {
            "title": named[0] if len(runs) == 1 else f"{' and '.join(named)} compared" if len(runs) == 2 else
            f"{len(runs)} runs compared",
            "runs": shown,
            "tile_names": list(dict.fromkeys(tile["name"] for run in shown for tile in run["numbers"])),
            "charts": charts,
            "timeline_rows": [_row_title(row) for row in timeline["rows"]],
            "left_out": timeline["left_out"],
            "previews": [part for run in shown if (part := run["previews"])],
            "has_data": any(run["ledgers"] or run["buckets"] or run["first_batches"] for run in shown),
            "has_events": any(run["events"]["notable"] or run["events"]["usual"] for run in shown),
            "environment": content.environments(runs),
            "shown_settings": _grouped([each for each in settings if (each.differs if len(runs) > 1 else each.given)]),
            "all_settings": _grouped(settings),
            "setting_count": len(settings),
            "written": self._now().strftime("%Y-%m-%d %H:%M UTC"),
            "version": __version__,
            "live": live,
            "data": in_script({"runs": named, "charts": [chart.to_json() for chart in charts]}),
            "timeline": in_script(timeline),
        }  # fmt: skip
        return rendered({**values, "sections": _sections(values)})

    def _run(self, run: Run, name: str, number: int, live: bool) -> dict[str, Any]:
        state = content.state_of(run, live=live, now=self._now())
        numbers = content.key_numbers(run, state)
        half_finished = images.previews(run, self._thumbs)
        return {
            "name": name,
            "colour": number % 8,
            "state": state,
            "step": words.count(state.step),
            "total": words.count(state.total),
            "about": _about(run),
            "numbers": numbers,
            "by_name": {tile["name"]: tile["value"] for tile in numbers},
            "ledgers": content.ledgers(run),
            "buckets": content.buckets(run),
            "first_batches": images.first_batches(run, self._thumbs),
            "events": content.events(run),
            "previews": half_finished
            and {"name": name, "rows": half_finished, "step": words.count(half_finished[0]["step"])},
        }


def _about(run: Run) -> str:
    """The model, how it is trained, and since when."""
    model = str(run.plan.get("model") or run.config.get("pretrained_model_name_or_path") or "")
    begun = next((words.moment(line["time"]) for line in run.events if line["time"]), "")
    kind = {"full": "every weight trained"}.get(str(run.config.get("model_type")), "")
    return " · ".join(part for part in (model, kind, begun and f"since {begun}") if part)


def _row_title(row: dict[str, Any]) -> str:
    name = f"{row['name']}, {row['size']}" + (f", picture {row['index'] + 1}" if row["index"] else "")
    return f"{name}: {row['prompt'][:60]}" if row["prompt"] else name


def _sections(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts that the page has: id and name."""
    there = {
        "curves": ("Curves", True),
        "pictures": ("Pictures", values["timeline_rows"] or values["previews"]),
        "data": ("Data", values["has_data"]),
        "settings": ("Settings", values["all_settings"]),
        "environment": ("Environment", values["environment"]),
        "events": ("Events", values["has_events"]),
    }
    return [(id, name) for id, (name, wanted) in there.items() if wanted]


def _grouped(settings: Sequence[Setting]) -> list[tuple[str, list[Setting]]]:
    return [(group, list(own)) for group, own in groupby(settings, key=lambda one: one.group)]


def told_apart(names: Sequence[str]) -> list[str]:
    """The names of runs, numbered where several are the same."""
    found = []
    for place, name in enumerate(names):
        same = names[:place].count(name)
        found.append(f"{name} ({same + 1})" if same else name)
    return found


def in_script(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it ends that, or begins a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rendered(values: dict[str, Any]) -> str:
    """The page's text. All that is filled in is escaped, but for the script, the style and JSON that was made safe."""
    from markupsafe import Markup

    safe = {name: Markup(values[name]) for name in ("data", "timeline")}
    own = {"css": Markup(_asset("report.css")), "script": Markup(_asset("report.js"))}
    return _template().render({**values, **safe, **own})


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.from_string(_asset("report.html.j2"))
