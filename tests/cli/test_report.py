"""`sana_tune report`: one run, several, another place, and folders that are none of a run."""

from __future__ import annotations

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.cli.report import report_asked
from scripts.benchmark_report import run_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [run_folder(root / name, 20, seed=seed, validations=1, side_px=8) for seed, name in enumerate("ab")]


def test_the_report_is_written_into_the_runs_folder(runs, capsys):
    assert exit_code(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out == f"wrote {runs[0] / 'report.html'}\n"
    assert "Training loss" in (runs[0] / "report.html").read_text(encoding="utf-8")


def test_several_runs_are_compared_in_a_file_of_their_own(runs, tmp_path):
    path = report_asked(runs, None)
    assert path == runs[0] / "report_compared.html" and "a and b compared" in path.read_text(encoding="utf-8")
    assert exit_code(["report", *map(str, runs), "--output", str(tmp_path / "new" / "both.html")]) == 0
    assert "validation_images" in (tmp_path / "new" / "both.html").read_text(encoding="utf-8")


def test_all_mistakes_are_told_at_once(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    asked = [tmp_path / "none", tmp_path / "empty", tmp_path / "file", runs[0]]
    assert exit_code(["report", *map(str, asked), "--output", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    for words in ("4 things are wrong", "none: must be the folder of a run", "does not exist", "empty: is not the",
                  "file: must be the folder of a run (its output_dir); it is a file", "is a folder"):  # fmt: skip
        assert words in told
    assert exit_code(["report"]) == 1
