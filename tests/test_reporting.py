"""What a run leaves for its report: events, surroundings, the first pictures as the model sees them; whole runs."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.reporting import dimmed
from sana_tune.run import run
from sana_tune.watch.journal import abandoned, read
from tests.data.pictures import put
from tests.journeys.kit import differences, metrics_of, one_thread, output_of, pictures, small_run, state_of

DRAWN = {"validation_disable": False, "validation_prompt": "A Red Mug", "validation_num_inference_steps": 2,
         "validation_resolution": "32x32", "validation_step_interval": 2, "use_ema": True}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a report, and its twin without one."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    with one_thread():
        for name, report in (("with", True), ("without", False)):
            pictures(folder / name / "pictures", 6, variants=2)
            loaded = small_run(folder / name, report=report, caption_dropout_probability=0.5, **DRAWN)
            run(loaded)
            found.append(output_of(loaded))
    return found


def test_the_report_of_a_run_changes_nothing_of_its_training(finished):
    report, plain = finished
    assert differences(state_of(report / "checkpoint-4"), state_of(plain / "checkpoint-4")) == []
    assert metrics_of(report) == metrics_of(plain) and metrics_of(report)
    assert (report / "report.html").is_file() and not (plain / "report.html").exists()
    assert not (plain / "first_batches").exists() and (plain / "events.jsonl").is_file()


def test_a_run_leaves_all_that_its_report_shows(finished):
    output = finished[0]
    kinds = [line["event"] for line in read(output / "events.jsonl")]
    assert kinds == ["started", "validated", "validated", "saved", "validated", "finished"]
    assert json.loads((output / "environment.json").read_text())["libraries"]["torch"] == torch.__version__
    prompts = json.loads((output / "prompts.json").read_text())
    assert prompts["validation"] == {"name": "validation", "prompt": "a red mug"}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["memory_bytes"] > 50e6 for line in lines)
    text = (output / "report.html").read_text(encoding="utf-8")
    for words in ("finished", "a red mug", "step 4 of 4", "The first training pictures"):
        assert words in text
    assert [path.name for path in output.glob(".*")] == []


def test_the_first_pictures_are_those_of_the_first_steps(finished):
    output = finished[0]
    shown = json.loads((output / "first_batches" / "index.json").read_text())["pictures"]
    assert len(shown) == 8 and {each["id"] for each in shown[:6]} == {f"d0/p{number:02}.png" for number in range(6)}
    captions = [each["caption"] for each in shown]
    assert "" in captions and any(caption.startswith("p ") for caption in captions)
    decoded = np.asarray(Image.open(output / "first_batches" / shown[0]["file"]), float)
    given = {f"d0/p{n:02}.png": Image.open(output.parent / "pictures" / f"p{n:02}.png") for n in range(6)}
    colours = {name: np.asarray(picture.convert("RGB"), float).mean((0, 1)) for name, picture in given.items()}
    nearest = min(colours, key=lambda name: np.abs(decoded.mean((0, 1)) - colours[name]).sum())
    assert decoded.shape == (32, 32, 3) and nearest == shown[0]["id"]


def test_a_run_that_goes_on_keeps_what_happened_and_decodes_nothing(tmp_path):
    pictures(tmp_path / "pictures", 6)
    settings = {"report": True, "checkpoint_step_interval": 2, "max_train_steps": 3}
    with one_thread():
        run(small_run(tmp_path, **settings))
        loaded = small_run(tmp_path, **{**settings, "max_train_steps": 5, "resume_from_checkpoint": "checkpoint-2"})
        output = output_of(loaded)
        (output / "first_batches" / "00.png").write_bytes(b"kept")
        run(loaded)
    lines = read(output / "events.jsonl")
    assert [line["step"] for line in lines if line["event"] == "started"] == [0, 2]
    gone = [(line["event"], line["step"]) for line, old in zip(lines, abandoned(lines), strict=True) if old]
    assert gone == [("saved", 3), ("finished", 3)]
    assert [line["step"] for line in metrics_of(output)] == [1, 2, 3, 4, 5]
    assert (output / "first_batches" / "00.png").read_bytes() == b"kept"
    assert "Resumed after step 2 from checkpoint-2" in (output / "report.html").read_text(encoding="utf-8")
    with one_thread():
        run(small_run(tmp_path, **settings), restart=True)
    assert [line["step"] for line in read(output / "events.jsonl") if line["event"] == "started"] == [0]
    assert (output / "before_restart_1" / "report.html").is_file()


def test_a_run_that_fails_says_so_in_its_report(tmp_path):
    pictures(tmp_path / "pictures", 4)
    loaded = small_run(tmp_path, report=True, learning_rate=1e30, max_bad_steps=1, max_train_steps=40)
    with one_thread(), pytest.raises(UserError):
        run(loaded)
    lines = read(output_of(loaded) / "events.jsonl")
    assert lines[-1]["event"] == "failed" and "not finite" in lines[-1]["message"]
    text = (output_of(loaded) / "report.html").read_text(encoding="utf-8")
    assert '<span class="pill tone-bad">failed</span>' in text and "not finite" in text


def test_latents_that_are_not_kept_are_made_for_it(tmp_path):
    pictures(tmp_path / "pictures", 4)
    with one_thread():
        run(small_run(tmp_path, report=True, vae_cache_disable=True, max_train_steps=1))
    assert len(list((tmp_path / "output" / "first_batches").glob("*.png"))) == 2  # of the one step that there is


def test_masks_are_shown_beside(tmp_path):
    pictures(tmp_path / "pictures", 2)
    for number in range(2):
        put(tmp_path / "masks", f"p{number:02}.png", 32, 32, seed=number)
    datasets = (
        {"id": "d0", "instance_data_dir": str(tmp_path / "pictures"), "conditioning_data": "m"},
        {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask",
         "instance_data_dir": str(tmp_path / "masks")},
    )  # fmt: skip
    with one_thread():
        run(small_run(tmp_path, *datasets, report=True, max_train_steps=1))
    (first, _) = json.loads((tmp_path / "output" / "first_batches" / "index.json").read_text())["pictures"]
    folder = tmp_path / "output" / "first_batches"
    whole, left = (np.asarray(Image.open(folder / first[name]), float) for name in ("file", "masked"))
    assert whole.shape == left.shape and (left <= whole + 1).all() and left.mean() < whole.mean()


def test_what_a_mask_leaves_out_is_dark():
    pixels = np.full((4, 8, 3), 200, np.uint8)
    found = dimmed(pixels, np.array([[1.0, 0.0]]))
    assert (found[:, :4] == 200).all() and (found[:, 4:] == 40).all()


def test_a_vae_that_fails_costs_the_pictures_alone(tmp_path, monkeypatch, caplog):
    from sana_tune import reporting

    def no_room(*_: object):
        raise torch.OutOfMemoryError("CUDA out of memory\nof a page")

    pictures(tmp_path / "pictures", 2)
    loaded = small_run(tmp_path, report=True, max_train_steps=1)
    monkeypatch.setattr(reporting, "vae_of", no_room)
    monkeypatch.setattr(log, "propagate", True)
    with one_thread(), caplog.at_level(logging.WARNING):
        assert run(loaded).step == 1
    assert "the report will not show the first training pictures: CUDA out of memory" in caplog.text
    assert "The first training pictures" not in (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
