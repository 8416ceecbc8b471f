"""A run's folder as values: parsed bit by bit, whatever is missing or torn left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sana_tune.watch.metrics import Metrics, line_of
from sana_tune.watch.report.reading import Reader, is_run, pictures_of
from scripts.benchmark_report import run_folder, steps_of


def test_a_folder_with_nothing_in_it_is_an_empty_run(tmp_path):
    run = Reader(tmp_path / "none").read()
    assert run.metrics.count == 0 and run.last_step == 0 and not run.events and not run.pictures
    assert not is_run(tmp_path) and not run.metrics.has("loss")


def test_everything_that_a_run_leaves_is_read(tmp_path):
    run = Reader(run_folder(tmp_path / "my run", 40, validations=2, side_px=16)).read()
    assert run.name == "my run" and run.metrics.count == run.last_step == 40 and is_run(run.root)
    assert run.metrics.levels.shape[1] == 4 and run.metrics.levels[:, 2].sum() == 40 * 4
    assert [line["step"] for line in run.of("started")] == [0] and run.of("finished")
    assert {(each.slug, each.step, each.view) for each in run.pictures} >= {("fox", 0, "raw"), ("tea", 40, "ema")}
    assert run.prompts["fox"]["prompt"] == "a red fox in the snow" and len(run.first_batches) == 5
    assert run.plan["total_steps"] == 40 and run.ledger["datasets"] and run.environment["python"]


def test_only_what_is_new_is_parsed_and_a_torn_line_waits(tmp_path, monkeypatch):
    path, steps = tmp_path / "metrics.jsonl", steps_of(6)
    lines = [json.dumps(line_of(step)) + "\n" for step in steps]
    path.write_text("".join(lines[:2]) + lines[2][:30])
    reader = Reader(tmp_path)
    assert reader.read().metrics.columns["step"].tolist() == [1, 2]
    parsed: list[bytes] = []
    add = reader._lines._add
    monkeypatch.setattr(reader._lines, "_add", lambda text: (parsed.append(text), add(text)))
    with open(path, "a") as file:
        file.write(lines[2][30:] + lines[3])
    found = reader.read().metrics
    assert found.columns["step"].tolist() == [1, 2, 3, 4] and len(list(filter(None, parsed))) == 2
    assert found.columns["loss"].tolist() == [step.loss for step in steps[:4]]


def test_a_file_that_was_cut_back_is_read_anew(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in steps_of(6):
        metrics.append(step)
    reader = Reader(tmp_path)
    assert reader.read().metrics.count == 6
    metrics.cut_back_to(2)
    metrics.append(steps_of(6, seed=1)[2])
    metrics.close()
    found = reader.read().metrics
    assert found.columns["step"].tolist() == [1, 2, 3] and found.columns["loss"][2] == steps_of(6, seed=1)[2].loss
    metrics.path.unlink()
    assert reader.read().metrics.count == 0


def test_lines_of_other_versions_and_broken_files_do_no_harm(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "by_sigma": [[3, 1, 0.5], [99, 1, 0.5]]}\nnonsense\n[]\n{"step": "x"}\n{"step": 2}\n'
    )
    for name in ("config.json", "plan.json", "ledger.json", "environment.json", "prompts.json"):
        (tmp_path / name).write_text("[1, 2")
    (tmp_path / "prompts.json").write_text('{"fox": "a text"}')
    run = Reader(tmp_path).read()
    assert run.metrics.columns["step"].tolist() == [1, 2] and np.isnan(run.metrics.columns["loss"]).all()
    assert run.metrics.levels.tolist() == [[0, 3, 1, 0.5]] and run.config == {} and run.prompts == {}


def test_pictures_are_known_by_their_names(tmp_path):
    names = ["step_0_a-b_0_64x32.png", "step_500_a-b_1_64x32_ema.webp", "step_500_contact_sheet.png", "notes.txt",
             "step_900_a-b_0_64x32.jpg"]  # fmt: skip
    for name in names:
        Path(tmp_path / name).touch()
    found = pictures_of(tmp_path, 500)
    assert [(each.step, each.slug, each.nth, each.width_px, each.height_px, each.view) for each in found] == [
        (0, "a-b", 0, 64, 32, "raw"), (500, "a-b", 1, 64, 32, "ema"),
    ]  # fmt: skip
    assert len(pictures_of(tmp_path)) == 3 and pictures_of(tmp_path / "none") == []
