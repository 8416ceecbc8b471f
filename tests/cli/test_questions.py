"""How answers are read: what people type, paste and drop, and what is said to those that are none."""

from __future__ import annotations

import os

import pytest

from sana_tune.cli.merge import Existing
from sana_tune.cli.questions import QUESTIONS, Machine, Question, choose, clean_path
from sana_tune.cli.recipe import Length, Target
from sana_tune.errors import UserError
from sana_tune.hardware import Device
from tests.cli.script import CPU, GB, H100, RTX, SANA, model, scan_of, state
from tests.data.pictures import put

ASKED = {question.key: question for question in QUESTIONS}


def refused(question: Question, text: str, *args) -> str:
    with pytest.raises(UserError) as told:
        question.read(text, *args)
    assert all(problem.where == question.flag and problem.fix for problem in told.value.problems)
    return str(told.value)


def test_ten_questions_each_explained():
    assert len(QUESTIONS) == 11 and list(ASKED)[3] == "subject"  # which belongs to the captions
    for question in QUESTIONS:
        assert question.title and question.why.endswith(".") and question.more and len(question.why) <= 78
        assert all(need in list(ASKED)[: list(ASKED).index(question.key)] for need in question.needs)


@pytest.mark.parametrize(
    "typed, path",
    [
        ("photos/", "photos"),
        ("  'my photos' ", "my photos"),
        ('"my photos/"', "my photos"),
        (r"/home/a/my\ photos\ \(1\)", "/home/a/my photos (1)"),
        ("file:///home/a/my%20photos", "/home/a/my photos"),
        ("写真/犬", "写真/犬"),
        ("/", "/"),
        ("", ""),
        ("C:\\it's", "C:\\it's"),
    ],
)
def test_paths_as_they_are_pasted(typed, path):
    assert clean_path(typed) == path


def test_home_and_backslashes_that_are_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert clean_path("~/a") == f"{tmp_path}/a"
    odd = tmp_path / "a\\ b"
    odd.mkdir()
    assert clean_path(str(odd)) == str(odd)


def test_a_choice_by_name_number_and_mistake():
    names = ("textfile", "filename")
    assert choose("2", names, "--x") == choose(" FileName ", names, "--x") == "filename"
    for text, fix in (
        ("textfiles", "did you mean textfile"),
        ("0", "from 1 to 2"),
        ("3", "from 1 to 2"),
        ("", "1 to 2"),
    ):
        with pytest.raises(UserError, match=fix):
            choose(text, names, "--x")


# ---- one by one ----


def test_models(tmp_path):
    question, here = ASKED["model"], state(tmp_path)
    assert question.read("1", here).name == SANA and question.read("nano", here).is_tiny
    other = question.read("somebody/sana-new", here)
    assert other.assumed and "does not know somebody/sana-new" in question.said(other, here)[0]
    assert "Licence" in question.said(question.read(SANA, here), here)[0]
    assert any(
        "break in bf16" in line
        for line in question.said(model("Efficient-Large-Model/Sana_600M_512px_diffusers"), here)
    )
    assert "numbers 1 to" in refused(question, "99", here)
    assert refused(question, "./nowhere", here)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(question, str(tmp_path / "file"), here)
    lines = question.choices(here)
    assert len(lines) >= 9 and all(len(line) <= 80 for line in lines) and "nano" in lines[-1]


@pytest.mark.parametrize("machine, name", [(CPU, "nano"), (RTX, SANA), (H100, SANA)])
def test_the_default_model(machine, name, tmp_path):
    assert ASKED["model"].default(state(tmp_path, machine)) == name


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = ASKED["pictures"]
    put(tmp_path / "my photos", "1.png")
    here = state(tmp_path)
    assert question.default(here) is None
    assert question.read("'my photos/'", here).folder == "my photos"
    assert "does not exist" in refused(question, "nowhere", here) and "'nowhere'" in refused(question, "nowhere", here)
    assert "must be named" in refused(question, " ", here)
    here.environ = {"DATA": "my photos"}
    assert question.read("{env:DATA}", here).folder == "{env:DATA}"  # stays as it is written
    with pytest.raises(UserError, match="is not set"):
        question.read("{env:NOTHING}", here)


def test_captions(tmp_path):
    question = ASKED["captions"]
    here = state(tmp_path, pictures=scan_of(20, with_text=18, with_name=1, names=("a dog in snow",)))
    assert question.default(here) == "textfile" and question.read("instance_prompt", here) == "instanceprompt"
    assert "2 pictures have no .txt" in question.said("textfile", here)[0]
    assert "Few of the file names" in question.said("filename", here)[0]
    assert question.said("instanceprompt", here) == []
    assert "18 of 20" in question.choices(here)[0] and "a dog in snow" in question.choices(here)[1]
    none = state(tmp_path, pictures=scan_of(20))
    assert "no picture in photos has a .txt" in refused(question, "textfile", none)


def test_the_subject(tmp_path):
    question, here = ASKED["subject"], state(tmp_path, pictures=scan_of(folder="rex"), captions="instanceprompt")
    assert question.applies(here) and question.default(here) == "a photo of rex"
    assert question.read("rex | max", here) == ("rex", "max") and question.read(" rex ", here) == "rex"
    assert "must not be empty" in refused(question, " | ", here)
    here.answers["captions"] = "textfile"
    assert not question.applies(here)
    here.given = {"subject": "rex"}
    assert question.applies(here)


def test_the_device(tmp_path):
    question = ASKED["target"]
    known = {"model": model(), "pictures": scan_of(), "captions": "filename"}
    here, there = state(tmp_path, RTX, **known), state(tmp_path, CPU, **known)
    assert question.default(here) == "25.76" and question.read("25.76", here) == Target(25_757_220_864)
    assert question.default(there) == "24" and question.read("80", there) == Target(80 * GB)
    assert "a CPU would take months" in refused(question, "cpu", there)
    assert "a LoKr on" in (said := refused(question, "1", here)) and "full-rank training" in said
    assert question.read("6", here) == Target(6 * GB)  # a LoKr fits
    tiny = state(tmp_path, CPU, **{**known, "model": model("nano")})
    assert question.default(tiny) == "cpu" and question.read("cpu", tiny) == Target(16 * GB, on_cpu=True)
    assert question.read("cpu", state(tmp_path, RTX, **{**known, "model": model("nano")})).beside_gpu
    assert "RTX 4090" in question.choices(here)[0] and question.choices(there) == []


def test_what_the_machine_has():
    assert "no NVIDIA GPU" in CPU.lines()[0]
    busy = Machine((Device("A", 24 * GB, 3 * GB), Device("B", 24 * GB, 24 * GB)), 0)
    assert busy.lines() == [
        "This machine: A, 24.0 GB, only 3.0 GB of it free now; B, 24.0 GB.", "Training runs on the first of them.",
    ]  # fmt: skip


def test_full_or_lokr(tmp_path):
    question = ASKED["adapter"]
    here = state(tmp_path, model=model(), pictures=scan_of(), captions="filename", target=Target(24 * GB))
    assert question.default(here) == "full"
    assert question.read("full", here) == question.read("1", here) == "full"
    assert question.read("lokr", here) == question.read("2", here) == "lokr"
    assert "must be one of full, lokr" in refused(question, "lora", here)
    assert question.said("full", here) == []
    assert question.said("lokr", here) == [
        "LoKr on 200 layers (160 in Attention, 40 in GLUMBConv), 14.94 M parameters = 0.93 % of the model."
    ]


def test_where_full_rank_does_not_fit_it_is_lokr(tmp_path):
    question = ASKED["adapter"]
    here = state(tmp_path, model=model(), pictures=scan_of(), captions="filename", target=Target(6 * GB))
    assert question.default(here) == "lokr" and question.read("lokr", here) == "lokr"
    assert "full-rank training" in (said := refused(question, "full", here)) and "choose lokr" in said


def test_resolutions(tmp_path):
    question = ASKED["resolutions"]
    sizes = ((1600, 1200), (640, 480), (1600, 1200))
    known = {"model": model(), "pictures": scan_of(3, sizes), "captions": "filename", "target": Target(24 * GB)}
    here = state(tmp_path, **known)
    assert question.default(here) == "1024" and question.read("1024,512", here) == (1024, 512)
    assert "1 of the 3 pictures is smaller" in question.said((1024,), here)[0]
    assert "made for 1024 px" in question.said((2048,), here)[0] and question.said((256,), here) == []
    assert "whole number" in refused(question, "big", here)
    assert "needs about" in refused(question, "8192", here)


def test_the_length(tmp_path):
    question = ASKED["length"]
    here = state(
        tmp_path,
        model=model(),
        pictures=scan_of(20),
        captions="filename",
        target=Target(80 * GB),
        resolutions=(1024, 512),
    )
    assert question.default(here) == "500"
    said = question.said(question.read("20 epochs", here), here)[0]
    assert said == "200 steps = about 20 epochs over 20 pictures at 2 resolutions, 4 pictures a step."
    assert question.read("7", here) == Length(steps=7) and refused(question, "soon", here)
    assert "20000 steps = about 2,000 epochs" in question.said(Length(steps=20_000), here)[0]
    here.existing = Existing(tmp_path, {"train_batch_size": "3", "max_train_steps": 70})
    assert question.default(here) == "70" and question.said(Length(steps=70), here)[0].startswith("3 pictures a step;")


def test_prompts(tmp_path):
    question = ASKED["prompt"]
    here = state(tmp_path, model=model(), pictures=scan_of(texts=("a dog",)), captions="textfile")
    assert question.default(here) == "a dog"
    assert "very short prompt" in question.said("a dog", here)[0]
    assert "word in < >" in question.said("a long picture of <token> in the wild snow", here)[0]
    assert question.said("a long picture of rex in the wild snow", here) == []
    assert "must not be empty" in refused(question, "  ", here)


def test_tracking(tmp_path):
    question, here = ASKED["tracking"], state(tmp_path)
    assert question.default(here) == "none" and question.said("none", here) == []
    assert "nobody is logged in" in question.said(question.read("wandb", here), here)[0]
    assert "tensorboard --logdir" in question.said(question.read("3", here), here)[0]
    assert question.read("tensorboard, wandb", here) == "wandb,tensorboard" == question.read("all", here)
    assert question.said("none", here) == []
    assert "must be one of" in refused(question, "mlflow", here)


def test_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question, here = ASKED["output"], state(tmp_path, pictures=scan_of(folder="a/My Dog"))
    assert question.default(here) == "output/my-dog"
    (tmp_path / "output" / "my-dog" / "checkpoint-5").mkdir(parents=True)
    assert question.default(here) == "output/my-dog-2"
    assert "go on with it" in question.said(question.read("output/my-dog/", here), here)[0]
    assert question.said(question.read("new/one", here), here) == []
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(question, "file/inside", here) and "must be named" in refused(question, "", here)
    assert question.read("{env:OUT}/x", here) == "{env:OUT}/x"


def test_an_output_that_nobody_may_write(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("root may write anywhere")
    assert "may not write" in refused(ASKED["output"], str(locked / "x"), state(tmp_path))
