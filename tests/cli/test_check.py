"""`sana_tune check`: its screen, its JSON, its exit codes, and bars only where somebody looks."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from sana_tune.check import Report, Setting, look_over
from sana_tune.cli.check import BUCKETS_SHOWN, SETTINGS_SHOWN, _settings, check_asked, screen, show
from sana_tune.cli.main import exit_code
from sana_tune.config.load import load
from sana_tune.errors import Problem
from tests.config.helpers import write_files
from tests.data.pictures import put

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    *("ok", "problems", "warnings", "notes", "config", "output", "settings"),
    *("model", "datasets", "images", "plan", "ledger", "left_out", "seconds"),
}


def config(folder: Path, dataset: dict[str, Any] | None = None, sizes: tuple[int, ...] = (64, 64), **settings) -> Path:
    """The config of a run on nano over pictures of these widths."""
    for number, width in enumerate(sizes):
        put(folder / "pictures", f"{number}.png", width, 64, seed=number, caption=f"picture {number}")
    return write_files(folder, {"caption_strategy": "textfile", "max_train_steps": 4, **settings}, dataset)


def lines(report: Report, width: int = 80) -> list[str]:
    return [text for _, text in screen(report, width)]


def test_the_screen_has_everything_in_eighty_columns(tmp_path, capsys):
    path = config(tmp_path, {"repeats": 2}, sizes=(64, 64, 96), validation_prompt="a cat", lr_warmup_steps=9)
    (tmp_path / "pictures" / "gone.png").write_bytes(b"no picture")
    assert exit_code(["check", "--config", str(path)]) == 0
    said = capsys.readouterr()
    rows = said.out.splitlines()
    assert said.err == "" and rows[-1] == "ok: nothing is wrong (2 warnings)"
    paths = [row for row in rows if str(tmp_path) in row]  # only what cannot be broken is longer
    assert [row for row in rows if len(row) > 80 and row not in paths] == [] and "\x1b" not in said.out
    for part in (
        "lr_warmup_steps", "Model     nano", "Dataset pictures", "4 pictures found = 3 trained + 1 left out",
        "left out: gone.png", "captions: 3; nothing amiss", "none of extreme shape", "Length    4 steps of",
        "text: 0 of 5 there, 5 to make", "Disk      about", "Memory    about", "Time      not known", "Warnings",
    ):  # fmt: skip
        assert part in said.out, part
    assert "    64x64        2       3        6   1       0      1" in rows


def test_problems_come_last_and_are_counted(tmp_path, capsys):
    path = config(tmp_path, max_train_steps=4, validation_resolution="33", validation_prompt="a red zib on blue ground")
    (tmp_path / "pictures" / "0.txt").unlink()
    assert exit_code(["check", "--config", str(path)]) == 1
    rows = capsys.readouterr().out.splitlines()
    last = len(rows) - rows[::-1].index("")  # what stands below the last empty line
    assert rows[-1] == "2 problems" and not any(row.startswith("error: ") for row in rows[:last])
    text = " ".join(" ".join(rows[last:]).split())
    for part in ("error: validation_resolution", "→ use 32x32", "1 picture has none: 0.png"):
        assert part in text


def test_mistakes_in_the_config_are_problems_like_others(tmp_path, capsys):
    path = config(tmp_path, sed=1, learning_rate=-1)
    assert exit_code(["check", "--config", str(path)]) == 1
    said = capsys.readouterr()
    assert said.out.endswith("2 problems\n") and "did you mean seed?" in said.out and said.err == ""
    assert exit_code(["check", "--config", str(tmp_path / "none.json"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == KEYS and found["plan"] is None and len(found["problems"]) == 1
    assert found["problems"][0].keys() == {"where", "what", "fix"}


def test_json_is_one_object_and_nothing_else(tmp_path, capsys):
    path = config(tmp_path, checkpoint_step_interval=2)
    assert exit_code(["check", "--config", str(path), "--json", "--seed", "9"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err == "" and found.keys() == KEYS and found["ok"] is True
    assert {"key": "seed", "value": 9, "default": 0, "origin": "command line: seed"} in found["settings"]
    assert found["plan"]["total_steps"] == 4 and found["plan"]["memory"]["need"]["total_bytes"] > 0
    assert {"misses", "hits", "unknown", "needed"} <= found["plan"]["caches"][0].keys()
    assert found["ledger"]["datasets"][0]["found"] == 2 and found["datasets"][0]["captions"]["variants"] == 2


def test_images_are_read_when_asked(tmp_path, capsys):
    path = config(tmp_path)
    (tmp_path / "pictures" / "1.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes())
    assert exit_code(["check", "--config", str(path), "--images", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"]["same"] == [["pictures/0.png", "pictures/1.png"]]


def test_an_example_can_be_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(["check", "--example", "nano"]) == 0
    assert "Dataset zib-aspects" in capsys.readouterr().out


# ---- the lines ----


def test_colours_are_for_terminals(tmp_path):
    report = Report(problems=(Problem("here [b]", "is wrong", "mend it"),), warnings=("careful",))
    console = Console(force_terminal=True, color_system="standard", record=True, width=60, file=open(os.devnull, "w"))
    show(report, console)
    styled = console.export_text(styles=True)
    assert "\x1b[31merror: here [b]: is wrong\x1b[0m" in styled and "\x1b[33m- careful" in styled


def test_long_lists_are_cut_and_say_so(tmp_path):
    settings = tuple(Setting(f"key{n}", "x" * 200, None, f"/a/very/long/way/config.json: key{n}") for n in range(50))
    rows = lines(Report(settings=settings))
    assert f"  … and {50 - SETTINGS_SHOWN} more (--json)" in rows and max(map(len, rows)) <= 80
    assert any(row.endswith("xxx  unset    config.json") for row in rows)
    path = config(tmp_path, {"resolution": 256}, sizes=tuple(range(64, 64 + 12 * (BUCKETS_SHOWN + 3), 12)))
    rows = lines(look_over(load(path, {}, {})))
    assert "    … and 3 buckets more with 3 images (--json)" in rows


def test_where_a_value_comes_from_is_short():
    origins = {
        "/home/me/config/config.json: --seed": "config.json",
        "command line: seed": "command line",
        "environment: MIXED_PRECISION": "environment: MIXED_PRECISION",
        "config.json: data_seed": "config.json: data_seed",
    }
    for origin, shown in origins.items():
        rows = lines(Report(settings=(Setting("seed", 1, 0, origin),)))
        assert any(row.endswith(f"  {shown}") for row in rows), origin


@pytest.mark.parametrize(("count", "said"), [(0, "ok: nothing is wrong"), (1, "1 problem"), (3, "3 problems")])
def test_the_last_line(count, said):
    report = Report(problems=tuple(Problem(f"place {n}", "is wrong") for n in range(count)))
    assert lines(report)[-1] == said


# ---- progress and interruption ----

TELL = """
import sys, time
from sana_tune.cli import check
check.BARS_AFTER_S = 0.05
with check.Progress() as progress:
    for done in range(1, 4):
        time.sleep(0.1)
        progress.tell("Reading pictures", done, 3)
print("done")
"""


def test_bars_are_drawn_on_a_terminal_and_leave_standard_output_alone():
    seen, side = pty.openpty()
    ran = subprocess.run([sys.executable, "-c", TELL], stdout=subprocess.PIPE, stderr=side, cwd=ROOT, text=True)
    os.close(side)
    assert ran.stdout == "done\n" and b"Reading pictures" in os.read(seen, 1 << 16)
    os.close(seen)
    ran = subprocess.run([sys.executable, "-c", TELL], capture_output=True, cwd=ROOT, text=True)
    assert (ran.stdout, ran.stderr) == ("done\n", "")


def test_an_interruption_ends_with_its_code(tmp_path, monkeypatch, capsys):
    path = config(tmp_path)

    def stopped(*_: object, **__: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr("sana_tune.cli.check.look_over", stopped)
    assert exit_code(["check", "--config", str(path)]) == 128 + signal.SIGINT
    assert "Traceback" not in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_report(tmp_path, capsys):
    path = config(tmp_path)
    assert check_asked([], str(path)) == 0
    assert check_asked(["--seed", "-1"], str(path)) == 1
    assert capsys.readouterr().out.endswith("1 problem\n")


def test_wide_letters_keep_the_columns():
    """Japanese letters take two columns each; a line of the settings stays within 80."""
    settings = [
        Setting(
            "output_dir",
            "output/写真の練習を何度も何度も繰り返す大きな実験のフォルダ",
            "output",
            "config.json: output_dir",
        )
    ]
    lines = [text for _, text in _settings(settings, 80)]
    assert max(map(cell_len, lines)) <= 80 and any("フォルダ" in line for line in lines)
