"""The page as text: whole, valid, escaped, alone; of one run, of several, and of runs that went wrong."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sana_tune.data.images import shrunk
from sana_tune.errors import UserError
from sana_tune.progress import Progress
from sana_tune.watch.events import Failed, Started
from sana_tune.watch.journal import EventsSink
from sana_tune.watch.report.page import Reporter, in_script, told_apart
from scripts.benchmark_report import run_folder
from tests.watch.report.hostile import EVIL, hostile_run

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page's elements: whether each is closed where it should be, its ids, its text, what is asked of elsewhere."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)
        self.close()
        self.wrong += [f"<{name}> is not closed" for name in self.open]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            self.wrong.append(f"<{tag}> has an attribute twice: {names}")
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append(f"</{tag}> closes {self.open[-3:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.elements[-1][1].get("id", "")] = data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*folders: Path, live: bool = False) -> Page:
    return Page(Reporter(folders, shrunk, lambda: NOW).text(folders[0], live=live))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "fox", 60, validations=2, side_px=16)


def test_the_page_is_valid_and_alone(folder):
    page = page_of(folder)
    assert page.wrong == [] and {"header", "nav", "main", "footer", "h1", "title"} <= {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) >= 20
    assert all("alt" in image and image["src"].startswith("data:") for image in page.of("img")) and page.of("img")
    asked = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert [value for value in asked if not value.startswith(("data:", "#"))] == []
    targets = {value[1:] for value in asked if value.startswith("#")}
    assert targets <= set(ids) and len(targets) == 6
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    labelled = {label.get("for") for label in page.of("label")}
    assert {each["id"] for each in page.of("input")} <= labelled and page.of("html") == [{"lang": "en"}]


def test_it_shows_what_the_run_left(folder):
    page = page_of(folder)
    for words in ("fox finished", "step 60 of 60", "Training loss", "Waiting for data", "Held-out loss", "400 trained",
                  "23 left out", "1024×1024", "The first training pictures", "a red fox in the snow", "learning_rate",
                  "torch", "overfitting" , "Half-finished samples", "Written 2026-01-31 12:00 UTC"):  # fmt: skip
        assert words.lower() in page.text.lower(), words
    charts = json.loads(page.scripts["report-data"])["charts"]
    drawn = [attributes["data-chart"] for _, attributes in page.elements if "data-chart" in attributes]
    assert [chart["id"] for chart in charts] == drawn and len(drawn) >= 12
    assert json.loads(page.scripts["report-timeline"])["steps"] == [0, 30, 60]
    assert "renewed while the run goes on" not in page.text and "renewed while" in page_of(folder, live=True).text


def test_no_text_becomes_markup_or_script(tmp_path):
    page = page_of(hostile_run(tmp_path))
    assert page.wrong == [] and "49" not in re.findall(r"window\.hacked=2' & *(\S+)", page.text)
    assert len(page.of("script")) == 4 and not any("onload" in attributes for _, attributes in page.elements)
    assert page.text.count("<script>window.hacked=1</script>") >= 12
    assert json.loads(page.scripts["report-timeline"])["rows"][0]["prompt"] == EVIL
    assert 'a "run" & <b>more' in page.text


def test_json_in_a_script_ends_nothing():
    text = in_script({"a": "</script><!--&\u2028"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": "</script><!--&\u2028"}


def test_runs_are_compared(folder, tmp_path):
    other = run_folder(tmp_path / "slow", 40, seed=2, validations=1, side_px=16, changes={"learning_rate": 4e-6})
    page = page_of(folder, other)
    assert page.wrong == [] and "fox and slow compared" in page.text
    assert "Differences" in page.text and "4e-06" in page.text
    (table,) = re.findall(r"Differences(.*?)All \d+ settings", page.text)
    assert "learning_rate" in table and "lr_warmup_steps" in table and "seed" not in table
    rows = json.loads(page.scripts["report-timeline"])["rows"]
    assert all(len(row["pictures"]) == 2 and all(row["pictures"]) for row in rows)
    assert json.loads(page.scripts["report-data"])["runs"] == ["fox", "slow"]
    assert "3 runs compared" in page_of(folder, other, folder).text
    assert told_apart(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path):
    sink = EventsSink(tmp_path)
    for event in (Started(Progress(), 100, 10.0), Failed("mixed_precision: fp16 needs a GPU\n  → use no")):
        sink.emit(event)
    sink.close()
    page = page_of(tmp_path)
    assert page.wrong == [] and "failed" in page.text and "fp16 needs a GPU" in page.text
    assert "There are no numbers yet" in page.text and page_of(tmp_path / "none").wrong == []


def test_an_old_folder_with_metrics_alone_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": 1.5, "lr": 1e-5}\n')
    page = page_of(tmp_path)
    assert page.wrong == [] and "1.5" in page.text and "Training loss" in page.text


def test_the_file_is_replaced_whole(folder, tmp_path):
    path = tmp_path / "new" / "report.html"
    reporter = Reporter([folder], shrunk)
    reporter.write(path)
    first = path.read_text(encoding="utf-8")
    reporter.write(path)
    assert first.endswith("</html>") and [each.name for each in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="cannot be written"):
        reporter.write(path / "below" / "report.html")
